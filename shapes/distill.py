"""Making four steps enough where much is open: the map of the ODE, learnt at the noise levels of the first steps.

A first block has several good answers, a later one still some. At high noise a flow points to their mean, and the
few-step sampler, which goes to that point and adds fresh noise, stays near it. So a frozen copy of the model solves
the flow's ODE in many steps from the noise level to a clean block, and the model learns to point there at once (the
idea of consistency distillation, arXiv 2303.01469, and of the ODE stage of Causal Forcing, arXiv 2602.02214). Short
clips are enough: what is learnt of their blocks holds for later ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shapes.forward import TrainingForward
from shapes.schedule import HISTORY_NOISE, SCHEDULE, SHIFT, add_noise

SOLVER_STEPS = 8
LEVELS = SCHEDULE.sigmas[:3]  # at the last step's noise level hardly anything is open any more


def distillation_loss(
    student: TrainingForward,
    teacher: TrainingForward,
    x0: Tensor,
    copies: int,
    embeds: Tensor,
    theirs: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Of blocks x0 [B, K, n, C, h, w], each over the true ones before it, which are a little noisy; `embeds` are the
    student's, `theirs` the teacher's."""
    level = HISTORY_NOISE * torch.rand(x0.shape[:2], generator=generator)
    history = add_noise(x0, torch.randn(x0.shape, generator=generator), level)
    target = x0[:, None].expand(-1, copies, -1, -1, -1, -1, -1)
    choice = torch.randint(len(LEVELS), target.shape[:3], generator=generator)
    sigma = torch.tensor(LEVELS)[choice]
    noisy = add_noise(target, torch.randn(target.shape, generator=generator), sigma)
    with torch.autocast("cpu", torch.bfloat16):
        clean = solve(teacher, history, noisy, sigma, theirs.detach())
        flow = student(history, noisy, 1000 * sigma, embeds)
    return torch.nn.functional.mse_loss(flow, (noisy - clean) / sigma[..., None, None, None, None])


@torch.no_grad()
def solve(flow: TrainingForward, history: Tensor, noisy: Tensor, sigma: Tensor, embeds: Tensor) -> Tensor:
    """The clean ends of the ODE's paths through `noisy`, by Euler's method on the shifted schedule."""
    u = sigma / (SHIFT - (SHIFT - 1) * sigma)
    x = noisy
    for step in range(SOLVER_STEPS):
        here, there = (_shifted(u * (1 - i / SOLVER_STEPS)) for i in (step, step + 1))
        x = x + (there - here)[..., None, None, None, None] * flow(history, x, 1000 * here, embeds)
    return x


def _shifted(u: Tensor) -> Tensor:
    return SHIFT * u / (1 + (SHIFT - 1) * u)
