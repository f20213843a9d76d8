"""The noise levels that the small model is trained at, and is sampled at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.runtime.schedule import DenoisingSchedule

SHIFT = 5.0
HISTORY_NOISE = 0.15  # the most noise that the clean blocks carry in training
SCHEDULE = DenoisingSchedule.build((1000, 750, 500, 250), SHIFT, warp=True)


def random_sigmas(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Half of them exactly the sampling steps', half from the shifted schedule."""
    steps = random_steps(shape, generator)
    u = 1 - torch.rand(tuple(shape), generator=generator)  # never 0
    return torch.where(torch.rand(tuple(shape), generator=generator) < 0.5, steps, SHIFT * u / (1 + (SHIFT - 1) * u))


def random_steps(
    shape: Sequence[int], generator: torch.Generator, first: int = 0, last: int = len(SCHEDULE) - 1
) -> Tensor:
    """Noise levels of the sampling steps `first` to `last`."""
    return torch.tensor(SCHEDULE.sigmas)[torch.randint(first, last + 1, tuple(shape), generator=generator)]


def noise_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Drawn on the CPU, so that a seed means the same noise everywhere."""
    return torch.randn(x.shape, generator=generator).to(x.device)


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - sigma) x0 + sigma noise; sigma [...] over blocks [..., n, C, h, w]."""
    return (1 - wide(sigma)) * x0 + wide(sigma) * noise


def flow_to(x0: Tensor, noisy: Tensor, sigma: Tensor) -> Tensor:
    """The flow that leads from noisy blocks to x0; where they are x0 noised, it is noise - x0."""
    return (noisy - x0) / wide(sigma)


def end_of(flow: Tensor, noisy: Tensor, sigma: Tensor) -> Tensor:
    """The x0 to which a flow leads from noisy blocks."""
    return noisy - wide(sigma) * flow


def wide(sigma: Tensor) -> Tensor:
    """[...] over blocks [..., n, C, h, w]."""
    return sigma[..., None, None, None, None]


def a_little_noisy(history: Tensor, generator: torch.Generator) -> Tensor:
    """Clean frames [B, F, C, h, w] as they stand in the history."""
    level = HISTORY_NOISE * torch.rand(history.shape[:2], generator=generator).to(history.device)
    return add_noise(history[:, :, None], noise_like(history, generator)[:, :, None], level).squeeze(2)
