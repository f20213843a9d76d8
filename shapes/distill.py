"""Making four steps enough where much is open: the map of the ODE, learnt at the noise levels of the sampling steps.

A first block has several good answers, a later one still some. At high noise a flow points to their mean, and the
few-step sampler, which goes to that point and adds fresh noise, stays near it: backgrounds come out mixed. So a frozen
copy of the model solves the flow's ODE in many steps from the noise level to a clean block, and the model learns to
point there at once (the idea of consistency distillation, arXiv 2303.01469, and of the ODE stage of Causal Forcing,
arXiv 2602.02214). Half of the starting points are where the sampler really comes by: the model's own answer of the
step before with fresh noise, not the truth with noise. Short clips are enough: what is learnt of their blocks holds for
later ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shapes.forward import TrainingForward
from shapes.schedule import SCHEDULE, SHIFT, a_little_noisy, add_noise, noise_like

SOLVER_STEPS = 8
LEVELS = torch.tensor(SCHEDULE.sigmas)


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
    target = x0[:, None].expand(-1, copies, -1, -1, -1, -1, -1)
    step = torch.randint(len(SCHEDULE), target.shape[:3], generator=generator)
    sigma, before = (LEVELS[at].to(x0.device) for at in (step, (step - 1).clamp(min=0)))
    own = (torch.rand(step.shape, generator=generator) < 0.5).to(x0.device) & (step > 0).to(x0.device)
    history = a_little_noisy(x0, generator)
    with torch.no_grad(), torch.autocast(x0.device.type, torch.bfloat16):
        noisy = add_noise(target, noise_like(target, generator), before)
        answer = noisy - _wide(before) * student(history, noisy, 1000 * before, embeds.detach())
        start = torch.where(_wide(own), answer, target)
        noisy = add_noise(start, noise_like(target, generator), sigma)
        clean = solve(teacher, history, noisy, sigma, theirs)
    with torch.autocast(x0.device.type, torch.bfloat16):  # a new one: it would remember weights without gradients
        flow = student(history, noisy, 1000 * sigma, embeds)
    return torch.nn.functional.mse_loss(flow, (noisy - clean) / _wide(sigma))


def _wide(x: Tensor) -> Tensor:
    """[...] over blocks [..., n, C, h, w]."""
    return x[..., None, None, None, None]


@torch.no_grad()
def solve(flow: TrainingForward, history: Tensor, noisy: Tensor, sigma: Tensor, embeds: Tensor) -> Tensor:
    """The clean ends of the ODE's paths through `noisy`, by Euler's method on the shifted schedule."""
    u = sigma / (SHIFT - (SHIFT - 1) * sigma)
    x = noisy
    for step in range(SOLVER_STEPS):
        here, there = (_shifted(u * (1 - i / SOLVER_STEPS)) for i in (step, step + 1))
        x = x + _wide(there - here) * flow(history, x, 1000 * here, embeds)
    return x


def _shifted(u: Tensor) -> Tensor:
    return SHIFT * u / (1 + (SHIFT - 1) * u)
