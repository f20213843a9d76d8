"""A schedule made ready for a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dummy.teacache import computed_steps
from pipeline.runtime.schedule import DenoisingSchedule
from wan.transformer.model import CausalWanModel, TimeContext


@dataclass(frozen=True)
class Denoising:
    """A schedule with what the model needs of its timesteps, and which of its steps run the layers (TeaCache)."""

    schedule: DenoisingSchedule
    steps: tuple[TimeContext, ...]
    computed: Sequence[bool]

    @classmethod
    def of(cls, model: CausalWanModel, schedule: DenoisingSchedule, threshold: float | None) -> Denoising:
        steps = tuple(model.encode_time(timestep) for timestep in schedule.timesteps)
        return cls(schedule, steps, computed_steps([time.modulation for time in steps], threshold))
