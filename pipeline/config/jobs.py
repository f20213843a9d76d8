"""What is to be made: one job a video, with its prompts, its seed and the names of its files.

Prompt files become jobs here; nothing is loaded or generated. A single prompt is a storyboard of one segment.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.cache_rules import check_cuts
from pipeline.config.checks import check_switches
from pipeline.config.config import InferenceConfig, as_dict
from utils.config import build
from utils.errors import InputError
from utils.file_names import output_stems
from utils.prompts import STORYBOARD_SUFFIX, Storyboard, is_storyboard_file, read_prompts, read_storyboards
from utils.seed import video_seed
from utils.user_paths import exists, is_folder, read_json, require_file, start_of_relative, user_path

logger = logging.getLogger(__name__)

MOST_VIDEOS = 100_000
# Settings that say which videos are made, where, how fast and in what memory; all others decide what they look like.
WHICH = ("data_path", "extended_prompt_path", "inference_iter", "num_samples", "num_flickering_samples")
WHERE = ("output_folder", "save_with_index", "save_metadata", "contact_sheet", "overwrite", "model_root")
HOW_FAST = ("device", "attention", "engine", "parallel", "compile_cache", "stream_output", "overlap")
WITH_WHAT_MEMORY = ("text_encoder_device", "vae_device", "vae_tile", "low_memory")
NOT_OF_THE_VIDEO = {*WHICH, *WHERE, *HOW_FAST, *WITH_WHAT_MEMORY}


@dataclass(frozen=True)
class VideoJob:
    """One video: `prompts[i]` takes effect at latent frame `starts[i]`, the first at 0; those of `cuts` begin another
    scene."""

    prompts: tuple[str, ...]
    starts: tuple[int, ...]
    prompt_index: int
    sample_index: int
    noise_seed: int
    path: Path
    start_from: Path | None = None
    cuts: tuple[int, ...] = ()

    @property
    def metadata_path(self) -> Path:
        return self.path.with_suffix(".json")


def read_jobs(config: InferenceConfig) -> list[VideoJob]:
    """All jobs of a run, prompt by prompt, sample by sample.

    `data_path` is a text file of prompts, or storyboards if it ends in .jsonl. Raises InputError for files that cannot
    be used.
    """
    path = Path(config.data_path)
    boards = read_storyboards(path, "data_path") if is_storyboard_file(path) else _single_prompts(config, path)
    stems = output_stems([board.prompts[0] for board in boards], config.save_with_index)
    chosen = list(zip(boards, stems, strict=True))
    if config.inference_iter > len(chosen):
        logger.warning("inference_iter: %d, but %s has only %d", config.inference_iter, path, len(chosen))
    elif config.inference_iter != -1:
        chosen = chosen[: config.inference_iter]
    generated = _generated_from(config, boards)[: len(chosen)]
    check_count(config, len(chosen) * config.num_samples)
    given = prefix_files(config, len(chosen))
    return [
        _job(config, board, index, sample, stem, start)
        for index, (board, (_, stem), start) in enumerate(zip(generated, chosen, given, strict=True))
        for sample in range(config.num_samples)
    ]


def check_count(config: InferenceConfig, videos: int) -> None:
    """Raises InputError for more videos than a run can mean; all of them are planned before the first is made."""
    if videos > MOST_VIDEOS:
        raise InputError(
            f"num_samples: {config.num_samples} for each prompt of data_path {config.data_path} are {videos} videos; "
            f"a run makes at most {MOST_VIDEOS}, so use fewer or set inference_iter"
        )


def _single_prompts(config: InferenceConfig, path: Path) -> list[Storyboard]:
    if config.switch_frame_indices:
        raise InputError(
            f"switch_frame_indices: {list(config.switch_frame_indices)} need storyboards, but data_path {path} is a "
            f"list of prompts; give a {STORYBOARD_SUFFIX} file or remove the key"
        )
    return [Storyboard((prompt,), None) for prompt in read_prompts(path, "data_path")]


def _generated_from(config: InferenceConfig, boards: Sequence[Storyboard]) -> Sequence[Storyboard]:
    """The storyboards with the prompts of `extended_prompt_path` in place of those that name the files.

    They go by the line, so that their numbers must agree.
    """
    if config.extended_prompt_path is None:
        return boards
    extended = read_prompts(Path(config.extended_prompt_path), "extended_prompt_path")
    if any(len(board.prompts) > 1 for board in boards):
        raise InputError(
            f"extended_prompt_path: {config.extended_prompt_path} has one prompt a line, but data_path "
            f"{config.data_path} holds storyboards; write the extended prompts into them and remove the key"
        )
    if len(extended) != len(boards):
        raise InputError(
            f"extended_prompt_path: {config.extended_prompt_path} has {len(extended)} prompts for the {len(boards)} of "
            f"data_path {config.data_path}; give one line for each prompt, in the same order"
        )
    return [Storyboard((prompt,), None) for prompt in extended]


def _job(
    config: InferenceConfig, board: Storyboard, index: int, sample: int, stem: str, start_from: Path | None
) -> VideoJob:
    switches = config.switch_frame_indices if board.switch_frames is None else board.switch_frames
    if len(board.prompts) != len(switches) + 1:
        raise InputError(
            f"data_path: storyboard {index + 1} of {config.data_path} has {len(board.prompts)} prompts for "
            f"{len(switches)} switches {list(switches)}; it needs one prompt more than switch_frame_indices"
        )
    where = f"data_path: storyboard {index + 1} of {config.data_path}"
    check_switches(switches, config, f"{where}: switch_frame_indices")
    cuts = tuple(frame for frame, cut in zip(switches, board.cuts, strict=False) if cut)
    check_cuts(switches, cuts, config, where)
    return VideoJob(
        prompts=board.prompts,
        starts=(0, *switches),
        prompt_index=index,
        sample_index=sample,
        noise_seed=video_seed(config.seed, index, sample),
        path=Path(config.output_folder) / f"{stem}-{sample}.mp4",
        start_from=start_from,
        cuts=cuts,
    )


def stale_reason(config: InferenceConfig, job: VideoJob) -> str:
    """A remark on the job's existing file if its metadata shows that the job would make another video, else ""."""
    now = {
        **{key: value for key, value in as_dict(config).items() if key not in NOT_OF_THE_VIDEO},
        "prompts": list(job.prompts),
        "switch_frame_indices": list(job.starts[1:]),
        "scene_cuts": list(job.cuts),
        "seed": job.noise_seed,
    }
    try:
        made: Any = read_json(job.metadata_path, "", "video's metadata")
        switches, seed = made["starts"][1:], made["noise_seed"]
        config_then = as_dict(build(InferenceConfig, made["config"]))  # with defaults for keys that are newer
        then = {**config_then, "prompts": made["prompts"], "switch_frame_indices": switches, "seed": seed}
        then["scene_cuts"] = made.get("scene_cuts", [])
    except (InputError, KeyError, TypeError):
        return ""  # no metadata, or not ours: nothing is known of the file
    others = [key for key, value in now.items() if then.get(key, value) != value]
    return f" although it was made with other {', '.join(others)}; overwrite=true makes it again" if others else ""


def prefix_files(config: InferenceConfig, prompts: int) -> list[Path | None]:
    """The file that each prompt starts from, None where it starts from noise.

    `start_from` names one file for all prompts, or a JSON list of names (or nulls), one a prompt. Raises InputError for
    files that are missing or lists that do not fit.
    """
    if config.start_from is None:
        return [None] * prompts
    source = Path(config.start_from)
    names: Sequence[object] = [config.start_from] * prompts
    if source.suffix.lower() == ".json":
        names = _listed_names(source, prompts)
    files = [None if name is None else user_path(str(name), "start_from") for name in names]
    for file in dict.fromkeys(files):
        if file is None:
            continue
        if not exists(file, "start_from"):
            where = start_of_relative(file)
            raise InputError(f"start_from: {file} does not exist; give an image or a video file{where}")
        if is_folder(file, "start_from"):
            raise InputError(f"start_from: {file} is a folder; give the image or video file in it")
        require_file(file, "start_from", "image or video file")
    return files


def _listed_names(source: Path, prompts: int) -> list[object]:
    content = read_json(source, "start_from", "JSON list of files")
    if not isinstance(content, list) or not all(name is None or isinstance(name, str) for name in content):
        raise InputError(f"start_from: {source} is not a list of file names and nulls, one for each prompt")
    if len(content) < prompts:
        raise InputError(f"start_from: {source} names {len(content)} files for {prompts} prompts; give one for each")
    return content[:prompts]
