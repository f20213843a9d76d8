"""The denoising schedule: shifted flow matching in a few steps (Self Forcing, arXiv 2506.08009).

Host floats only. With v = noise - x0 and x = (1 - sigma) * x0 + sigma * noise, x0 = x - sigma * v.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

TRAIN_STEPS = 1000


def _shifted(u: float, shift: float) -> float:
    return shift * u / (1 + (shift - 1) * u)


@dataclass(frozen=True)
class DenoisingSchedule:
    """Timesteps (0 to 1000, what the model is told) and noise levels sigma (0 to 1) of the steps, noisiest first."""

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]

    @classmethod
    def build(cls, steps: Sequence[int], shift: float, warp: bool) -> DenoisingSchedule:
        """From `denoising_step_list`, `timestep_shift` and `warp_denoising_step`.

        Warped, a step counts places of the shifted schedule; unwarped, it is the timestep itself, and its sigma the
        nearest of the schedule's 1000 entries.
        """
        if warp:
            sigmas = tuple(_shifted(step / TRAIN_STEPS, shift) for step in steps)
            return cls(tuple(TRAIN_STEPS * sigma for sigma in sigmas), sigmas)
        table = [_shifted(1 - i / TRAIN_STEPS, shift) for i in range(TRAIN_STEPS)]
        nearest = tuple(min(table, key=lambda sigma: abs(TRAIN_STEPS * sigma - step)) for step in steps)
        return cls(tuple(float(step) for step in steps), nearest)

    def __len__(self) -> int:
        return len(self.timesteps)

    def predict_x0(self, x: Tensor, flow: Tensor, step: int) -> Tensor:
        """The clean latents that `flow` points to from x at `step`; any equal shapes."""
        return x - self.sigmas[step] * flow

    def renoise(self, x0: Tensor, noise: Tensor, step: int) -> Tensor:
        """x0 with fresh noise at the level of `step`; any equal shapes."""
        sigma = self.sigmas[step]
        return (1 - sigma) * x0 + sigma * noise
