"""What VBench asks for: which videos, under which names, and whether a folder holds them.

VBench finds a video by its prompt, `{short prompt}-{sample}.mp4`, letter for letter, in one flat folder; 5 of each
prompt, 25 of those that score temporal flickering. The video is generated from the extended prompt of the same line.
This file makes no video and does not import vbench, which needs an environment of its own.
"""

from __future__ import annotations

import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.config import InferenceConfig
from pipeline.config.jobs import VideoJob, check_count
from utils.errors import InputError, quoted
from utils.files import ensure_writable_folder, partial_path, write_atomic
from utils.prompts import is_storyboard_file, read_prompts
from utils.seed import video_seed
from utils.user_paths import exists, is_folder
from utils.video_probe import NotAWholeVideo, probe
from wan.geometry import pixel_frames

logger = logging.getLogger(__name__)

LISTS = Path(__file__).parents[2] / "prompts" / "vbench"
STANDARD_LIST = LISTS / "all_dimension.txt"
FLICKERING_LIST = LISTS / "temporal_flickering.txt"
FLICKERING_SAMPLES = 25
LOOKED_FOR = 5  # VBench's standard mode looks for samples 0 to 4 of every prompt
EXTENDED_LIST_URL = (
    "https://raw.githubusercontent.com/guandeh17/Self-Forcing/main/prompts/vbench/all_dimension_extended.txt"
)

_NAME_BYTES = 255  # of the usual file systems
_NOT_IN_NAMES = '<>:"/\\|?*\0' if os.name == "nt" else "/\0"
_SHOWN = 10  # names in a report


def read_vbench_jobs(config: InferenceConfig) -> list[VideoJob]:
    """One job for each video, prompt by prompt; a prompt that the list repeats is made once.

    A video's seed follows from the line of its prompt's first occurrence and its sample number. Raises InputError for
    lists that cannot be used and prompts that cannot be file names.
    """
    _require_text_alone(config)
    prompts = read_prompts(Path(config.data_path), "data_path")
    generated = _extended(config, prompts)
    if config.inference_iter > len(prompts):
        logger.warning("inference_iter: %d, but %s has %d", config.inference_iter, config.data_path, len(prompts))
    chosen = prompts if config.inference_iter == -1 else prompts[: config.inference_iter]
    first_lines = {prompt: index for index, prompt in reversed(list(enumerate(chosen)))}
    flickering = frozenset(read_prompts(FLICKERING_LIST))
    flickers, others = range(config.num_flickering_samples), range(config.num_samples)
    samples = {prompt: flickers if prompt in flickering else others for prompt in first_lines}
    check_count(config, sum(map(len, samples.values())))
    return [
        _job(config, prompt, generated[index], index, sample)
        for prompt, index in sorted(first_lines.items(), key=lambda item: item[1])
        for sample in samples[prompt]
    ]


def _require_text_alone(config: InferenceConfig) -> None:
    if is_storyboard_file(Path(config.data_path)) or config.switch_frame_indices:
        raise InputError(
            f"data_path: VBench takes one prompt a video, not storyboards ({config.data_path}, switch_frame_indices "
            f"{list(config.switch_frame_indices)}); give a list of prompts and no switches"
        )
    for field in ("start_from", "stream_output", "contact_sheet"):
        if getattr(config, field):
            raise InputError(f"{field}: has no use for VBench's videos; remove the key")


def _extended(config: InferenceConfig, prompts: Sequence[str]) -> list[str]:
    """What each of `prompts` is generated from, line by line."""
    if config.extended_prompt_path is None:
        return list(prompts)
    path = Path(config.extended_prompt_path)
    if not exists(path, "extended_prompt_path"):
        raise InputError(
            f"extended_prompt_path: {path} does not exist. Run sample_vbench.py with --fetch to get the list that "
            "Self-Forcing was evaluated with, or set extended_prompt_path=null to generate from the short prompts."
        )
    extended = read_prompts(path, "extended_prompt_path")
    if len(extended) != len(prompts):
        raise InputError(
            f"extended_prompt_path: {path} has {len(extended)} prompts for the {len(prompts)} of data_path "
            f"{config.data_path}; give one line for each, in the same order"
        )
    return extended


def _job(config: InferenceConfig, prompt: str, generated: str, index: int, sample: int) -> VideoJob:
    return VideoJob(
        prompts=(generated,),
        starts=(0,),
        prompt_index=index,
        sample_index=sample,
        noise_seed=video_seed(config.seed, index, sample),
        path=_video_path(Path(config.output_folder), prompt, sample),
    )


def _video_path(folder: Path, prompt: str, sample: int) -> Path:
    """Raises InputError if the prompt cannot be a file's name; a changed name would not be found."""
    path = folder / "name"
    bad = [char for char in prompt if char in _NOT_IN_NAMES]
    if not bad:
        path = folder / f"{prompt}-{sample}.mp4"
        if max(len(os.fsencode(name)) for name in (path.name, partial_path(path).name)) <= _NAME_BYTES:
            return path
    reason = f"holds {bad[0]!r}" if bad else f"is too long, {len(prompt.encode())} bytes"
    raise InputError(
        f"data_path: the prompt {quoted(prompt)} cannot be the name of a file: it {reason}. VBench finds a video by "
        "its prompt letter for letter and would not find one under a changed name. Change the prompt, or take it out."
    )


@dataclass(frozen=True)
class FolderReport:
    """A folder against what a run should have made and what VBench looks for; names of files throughout."""

    wanted: int
    missing: tuple[str, ...]
    broken: tuple[str, ...]  # with the reason
    foreign: tuple[str, ...]
    unfound: tuple[str, ...] | None  # None: the prompts are not VBench's

    @property
    def ok(self) -> bool:
        return not (self.missing or self.broken or self.foreign or self.unfound)

    def lines(self) -> Iterator[str]:
        """The report for people."""
        whole = self.wanted - len(self.missing) - len(self.broken)
        yield f"{whole} of {self.wanted} videos are there and whole"
        yield from _listed("missing; run again to make them", self.missing)
        yield from _listed("broken; delete them and run again", self.broken)
        yield from _listed("not of this list; VBench's folder holds nothing else, so move them away", self.foreign)
        if self.unfound is None:
            yield "The prompts are not all VBench's: its mode custom_input takes them, its standard mode does not"
        else:
            yield from _listed("looked for by VBench's standard mode and not found", self.unfound)


def _listed(what: str, names: Sequence[str]) -> Iterator[str]:
    if names:
        yield f"{len(names)} {what}:"
        yield from (f"  {name}" for name in names[:_SHOWN])
        if len(names) > _SHOWN:
            yield f"  ... and {len(names) - _SHOWN} more"


def check_folder(config: InferenceConfig, jobs: Sequence[VideoJob]) -> FolderReport:
    """Decode every video of `jobs` and look for what VBench looks for. Changes nothing."""
    folder = Path(config.output_folder)
    there = set(os.listdir(folder)) if is_folder(folder, "output_folder") else set()
    wanted = {job.path.name for job in jobs}
    present = sorted(wanted & there)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = list(pool.map(lambda name: _fault(config, folder / name), present))
    standard = read_prompts(STANDARD_LIST)
    ours = set(read_prompts(Path(config.data_path), "data_path")) <= set(standard)
    looked_for = [f"{prompt}-{i}.mp4" for prompt in dict.fromkeys(standard) for i in range(LOOKED_FOR)]
    of_vbench = {f"{prompt}-{i}.mp4" for prompt in standard for i in range(FLICKERING_SAMPLES)} if ours else set()
    return FolderReport(
        wanted=len(wanted),
        missing=tuple(job.path.name for job in jobs if job.path.name not in there),
        broken=tuple(f"{name}: {fault}" for name, fault in zip(present, faults, strict=True) if fault),
        foreign=tuple(sorted(there - wanted - of_vbench)),
        unfound=tuple(name for name in looked_for if name not in there) if ours else None,
    )


def _fault(config: InferenceConfig, path: Path) -> str:
    """What is wrong with a video, or nothing."""
    try:
        info = probe(path)
    except NotAWholeVideo as error:
        return str(error).removeprefix(f"{path}: ")
    height, width = config.pixel_size
    found = (info.width, info.height, info.frames, info.fps)
    expected = (width, height, pixel_frames(config.num_output_frames), float(config.fps))
    if found == expected:
        return ""
    return "{}x{}, {} frames at {:g} a second".format(*found) + " instead of {}x{}, {} at {:g}".format(*expected)


def fetch_extended_list(config: InferenceConfig, url: str = EXTENDED_LIST_URL) -> Path:
    """Download the extended prompts to `extended_prompt_path`, unless that is there; returns its path.

    Raises InputError if they cannot be had, or are not one for each line of `data_path`.
    """
    if config.extended_prompt_path is None:
        raise InputError("extended_prompt_path: is not set, so there is nothing to fetch; set it to the file to make")
    path = Path(config.extended_prompt_path)
    if exists(path, "extended_prompt_path"):
        return path
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            text: str = answer.read().decode("utf-8")
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise InputError(
            f"extended_prompt_path: {url} cannot be had ({error}). Get it by other means and write it to {path}."
        ) from error
    lines, prompts = text.splitlines(), read_prompts(Path(config.data_path), "data_path")
    if len(lines) != len(prompts) or not all(line.strip() for line in lines):
        raise InputError(
            f"extended_prompt_path: {url} has {len(lines)} lines, but data_path {config.data_path} has {len(prompts)}; "
            "it is not the list that goes with it"
        )
    ensure_writable_folder(path.parent, "extended_prompt_path")
    write_atomic(path, text)
    return path
