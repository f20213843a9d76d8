"""The noise levels that the small model is trained at, and is sampled at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.schedule import DenoisingSchedule

SHIFT = 5.0
HISTORY_NOISE = 0.15  # the most noise that the clean blocks carry in training
SCHEDULE = DenoisingSchedule.build((1000, 750, 500, 250), SHIFT, warp=True)


def random_sigmas(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Half of them exactly the sampling steps', half from the shifted schedule."""
    steps = torch.tensor(SCHEDULE.sigmas)[torch.randint(len(SCHEDULE), tuple(shape), generator=generator)]
    u = torch.rand(tuple(shape), generator=generator)
    return torch.where(torch.rand(tuple(shape), generator=generator) < 0.5, steps, SHIFT * u / (1 + (SHIFT - 1) * u))


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - sigma) x0 + sigma noise; sigma [...] over blocks [..., n, C, h, w]."""
    sigma = sigma[..., None, None, None, None]
    return (1 - sigma) * x0 + sigma * noise
