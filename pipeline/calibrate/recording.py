"""Recording a calibration: videos made by the product's own loop over full history, and watched.

The file is written anew after every video, so that a run that is killed goes on where it was; a file with fewer videos
than were asked for is a calibration all the same, and whoever uses it is told.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dummy.calibration.measured import Calibration
from dummy.calibration.recorder import CalibrationRecorder
from pipeline.atlas.recording import ChosenPasses, choose_passes, watch, watched_generator, watched_policy
from pipeline.config.config import InferenceConfig, as_dict, geometry_of
from pipeline.config.jobs import NOT_OF_THE_VIDEO, VideoJob, read_jobs
from pipeline.runtime.calibrated import checkpoint_identity, subject_of
from pipeline.runtime.generator import BlockGenerator
from pipeline.runtime.loading import model_sizes
from pipeline.runtime.output_weights import gates_of, output_grams
from utils.errors import InputError
from utils.prompts import is_storyboard_file
from wan.attention.head_group import Retention
from wan.config import ModelConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recording:
    """What is to be measured; `config` is `over_full_history` of what was given."""

    config: InferenceConfig
    passes: ChosenPasses
    candidates: tuple[Retention, ...]
    queries: int
    videos: int

    def jobs(self) -> list[VideoJob]:
        """The first samples of all prompts, then the second ones, until there are enough. Raises InputError."""
        prompts = len(read_jobs(self.config))
        samples = -(-self.videos // prompts)
        jobs = read_jobs(replace(self.config, num_samples=samples))
        return sorted(jobs, key=lambda job: (job.sample_index, job.prompt_index))[: self.videos]


def over_full_history(config: InferenceConfig) -> InferenceConfig:
    """The configuration with all that its video is made of, but nothing that heads forget.

    FP8 gives way to the precision below it: the rows of the output projection are wanted as they are.
    """
    listed = not is_storyboard_file(Path(config.data_path))
    return replace(
        config,
        dummy_forcing=InferenceConfig().dummy_forcing,  # off
        model_kwargs=replace(config.model_kwargs, local_attn_size=-1, ema_sink_alpha=None, rolling_sink=False),
        rope="absolute",
        rope_window=None,
        precision="auto" if config.precision == "fp8" else config.precision,
        num_samples=1,
        switch_frame_indices=() if listed else config.switch_frame_indices,
    )


def chosen_passes(config: InferenceConfig, blocks: str | None, steps: str | None) -> ChosenPasses:
    """From `--blocks` (by default all that have a past) and `--steps` (by default all of denoising). Raises
    InputError."""
    denoising = ",".join(str(step) for step in range(len(config.denoising_step_list)))
    return choose_passes(config, blocks, denoising if steps is None else steps)


def record(
    recording: Recording, device: torch.device, out: Path, about: Mapping[str, Any], on_video: Callable[[], object]
) -> Calibration:
    """Make the videos that `out` lacks, and store each as soon as it is done. Raises InputError for files that do not
    fit, and for an `out` that holds something else."""
    config, jobs = recording.config, recording.jobs()
    sizes, identity = model_sizes(config), checkpoint_identity(config)
    begun = empty(recording, sizes, identity, about)
    done = stored(out, begun, jobs)
    for _ in done.videos:
        on_video()
    rest = jobs[len(done.videos) :]
    done = replace(done, about={**done.about, "wanted": recording.videos})
    if not rest:
        done.save(out)
        return done
    generator, embeds = watched_generator(config, rest, watched_policy(config, "dense"), device)
    geometry = geometry_of(config, sizes.in_dim)
    recorder = CalibrationRecorder(
        recording.passes.wanted,
        recording.passes.count,
        geometry.tokens_per_frame,
        recording.candidates,
        recorded_grams(generator, recording.passes),
        recording.queries,
    )
    for job in rest:
        recorder.begin()
        watch(generator, geometry, job, embeds, recorder, recording.passes.blocks[-1])
        done = with_video(done, job, *recorder.finish())
        done.save(out)
        on_video()
    return done


def empty(recording: Recording, sizes: ModelConfig, identity: str, about: Mapping[str, Any]) -> Calibration:
    """A calibration of no videos yet."""
    config, blocks = recording.config, recording.passes.blocks
    shape = 0, len(blocks), sizes.num_layers, sizes.num_heads
    weights = [config.generator_path, *(lora.path for lora in config.lora_files)]
    facts = {
        "model": config.model_name,
        "weights": " + ".join(path.name for path in weights),
        "sizes": asdict(sizes),
        "queries": recording.queries,
        "seeds": [],
        "config": as_dict(config),
    }
    return Calibration(
        recording.candidates,
        torch.zeros(*shape, len(recording.candidates)),
        torch.zeros(shape),
        blocks,
        tuple(name for _, name in recording.passes.passes),
        (),
        subject_of(config, sizes, identity),
        {**facts, **about},
    )


def with_video(calibration: Calibration, job: VideoJob, errors: Tensor, outputs: Tensor) -> Calibration:
    """The calibration with one more video's errors [B, layers, heads, C] and outputs [B, layers, heads]."""
    return replace(
        calibration,
        errors=torch.cat((calibration.errors, errors[None])),
        outputs=torch.cat((calibration.outputs, outputs[None])),
        videos=(*calibration.videos, job.prompts[0]),
        about={**calibration.about, "seeds": [*calibration.about["seeds"], job.noise_seed]},
    )


def stored(out: Path, begun: Calibration, jobs: Sequence[VideoJob]) -> Calibration:
    """What `out` has of the videos of `jobs` already. Raises InputError if it holds anything else."""
    if not out.exists():
        return begun
    there = Calibration.load(out, "--out")
    other = list(_differences(there, begun))
    seeds = there.about.get("seeds")
    known = [(job.prompts[0], job.noise_seed) for job in jobs]
    if not isinstance(seeds, list) or list(zip(there.videos, seeds, strict=False)) != known[: len(there.videos)]:
        other.append("prompts, seeds or number of videos")
    if other:
        raise InputError(
            f"--out: {out} exists and was made with other {', '.join(other)}; delete it, give another file, or use the "
            "settings that it was begun with"
        )
    return there


def _differences(there: Calibration, begun: Calibration) -> Iterator[str]:
    for name in ("candidates", "blocks", "passes", "subject"):
        if getattr(there, name) != getattr(begun, name):
            yield {"subject": "model, weights or sizes"}.get(name, name)
    if there.about.get("queries") != begun.about["queries"]:
        yield "queries"
    old, new = (one.about.get("config") for one in (there, begun))
    if not isinstance(old, dict) or not isinstance(new, dict):
        yield "settings"
        return
    keys = [key for key in new if key not in NOT_OF_THE_VIDEO and old.get(key) != new[key]]
    if keys:
        yield f"settings ({', '.join(keys)})"


def recorded_grams(generator: BlockGenerator, passes: ChosenPasses) -> list[Tensor]:
    """`output_grams` with the gates of the recorded passes."""
    times = [*generator.usual.steps, generator.clean]
    return output_grams(generator.model, gates_of([times[place] for place, _ in passes.passes]))
