"""Making four steps enough where much is open: the map of the ODE, learnt at the noise levels of the first steps.

A first block has several good answers, a later one still some. At high noise a flow points to their mean, and the
few-step sampler, which goes to that point and adds fresh noise, stays near it: backgrounds come out mixed. So a frozen
copy of the model solves the flow's ODE in many steps from the noise level to a clean block, and the model learns to
point there at once (the idea of consistency distillation, arXiv 2303.01469, and of the ODE stage of Causal Forcing,
arXiv 2602.02214). Short clips are enough: what is learnt of their blocks holds for later ones.

At the later steps flow matching goes on: half of the noisy copies are there. Starting the solver from the model's own
answers was tried instead: it keeps what the model got wrong, since the teacher believes what it sees more than the
caption, and fewer and fewer shapes came out right.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shapes.forward import Plan, TrainingForward
from shapes.runs import fast_precision
from shapes.schedule import SHIFT, a_little_noisy, add_noise, flow_to, noise_like, random_steps, wide

SOLVER_STEPS = 8
DISTILLED_STEPS = 2  # the first ones: a background is decided by the third, a shape by the fourth


def distillation_loss(
    student: TrainingForward,
    teacher: TrainingForward,
    x0: Tensor,
    copies: int,
    embeds: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Of blocks x0 [B, K, n, C, h, w], each over the true ones before it, which are a little noisy."""
    target = x0[:, None].expand(-1, copies, -1, -1, -1, -1, -1)
    solved = copies // 2
    early = random_steps(target[:, :solved].shape[:3], generator, last=DISTILLED_STEPS - 1)
    late = random_steps(target[:, solved:].shape[:3], generator, first=DISTILLED_STEPS)
    sigma = torch.cat((early, late), dim=1).to(x0.device)
    noise = noise_like(target, generator)
    noisy, goal = add_noise(target, noise, sigma), noise - target
    plan = Plan(x0.shape[1])
    history = a_little_noisy(x0.flatten(1, 2), generator)
    with fast_precision(x0.device):
        clean = solve(teacher, history, noisy[:, :solved], sigma[:, :solved], embeds, plan)
        goal[:, :solved] = flow_to(clean, noisy[:, :solved], sigma[:, :solved])
        flow = student(history, noisy, 1000 * sigma, embeds, plan)
    return torch.nn.functional.mse_loss(flow, goal)


@torch.no_grad()
def solve(flow: TrainingForward, history: Tensor, noisy: Tensor, sigma: Tensor, embeds: Tensor, plan: Plan) -> Tensor:
    """The clean ends of the ODE's paths through `noisy`, by Euler's method on the shifted schedule."""
    u = sigma / (SHIFT - (SHIFT - 1) * sigma)
    x = noisy
    for step in range(SOLVER_STEPS):
        here, there = (_shifted(u * (1 - i / SOLVER_STEPS)) for i in (step, step + 1))
        x = x + wide(there - here) * flow(history, x, 1000 * here, embeds, plan)
    return x


def _shifted(u: Tensor) -> Tensor:
    return SHIFT * u / (1 + (SHIFT - 1) * u)
