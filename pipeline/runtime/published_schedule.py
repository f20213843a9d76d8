"""Whether a checkpoint whose file's name tells which one it is runs by the schedule that it was distilled for."""

from __future__ import annotations

import logging

from pipeline.config.config import InferenceConfig
from pipeline.runtime.schedule import DenoisingSchedule
from utils.errors import shown
from wan.checkpoints.published import ModelSpec, Schedule, config_files, published_as

logger = logging.getLogger(__name__)

PUBLISHED_SHIFT = 5.0
CLOSE = 1.0  # of 1000; lists of neighbours that are warped already are rounded to integers


def warn_of_another_schedule(config: InferenceConfig) -> None:
    """One warning for a generator that was distilled for other steps or blocks than the settings have."""
    known = published_as(config.generator_path)
    if not known or any(_is_its_own(config, spec) for spec in known):
        return
    first = config.denoising_step_list_first_chunk or config.first_frame_denoising_step_list
    own = Schedule(config.denoising_step_list, config.num_frame_per_block, first, config.rolling is not None)
    shift = config.model_kwargs.timestep_shift if config.warp_denoising_step else None
    shifted = "" if shift == PUBLISHED_SHIFT else " not warped" if shift is None else f" shifted by {shift:g}"
    logger.warning(
        "generator_ckpt: %s is by its name %s, which was made for %s; these settings have %s%s, so its videos may be "
        "much worse. %s has its own.",
        shown(config.generator_path),
        " or ".join(spec.name for spec in known),
        known[0].schedule.words(),
        own.words(),
        shifted,
        config_files(known).split(", ")[0],
    )


def _is_its_own(config: InferenceConfig, spec: ModelSpec) -> bool:
    first = config.denoising_step_list_first_chunk or config.first_frame_denoising_step_list
    steps = config.denoising_step_list
    made_for = spec.schedule
    return (
        config.num_frame_per_block == made_for.block
        and (config.rolling is not None) == made_for.rolling
        and _same(config, steps, made_for.steps)
        and _same(config, first or steps, made_for.first or made_for.steps)
    )


def _same(config: InferenceConfig, steps: tuple[int, ...], published: tuple[int, ...]) -> bool:
    """Whether steps of the settings are the published ones, once both are the timesteps that the model is told."""
    shift, warp = config.model_kwargs.timestep_shift, config.warp_denoising_step
    ours = DenoisingSchedule.build(steps, shift, warp).timesteps
    theirs = DenoisingSchedule.build(published, PUBLISHED_SHIFT, True).timesteps
    return len(ours) == len(theirs) and all(abs(a - b) < CLOSE for a, b in zip(ours, theirs, strict=True))
