"""Blocks that the model draws for its own training, through the product's cache and in its sampling steps.

What it has drawn is its history then, and what each step has made of a block is what the next one has to mend
(self-rollout, after Self Forcing, arXiv 2506.08009; the truth stands in for their critics). Where a drawn block is too
far from the truth for that to teach anything, the truth takes its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shapes.forward import Plan
from shapes.schedule import SCHEDULE, noise_like, wide
from wan.geometry import LatentGeometry
from wan.transformer.model import CausalWanModel

LOST = 0.5  # mean square error of a block that is given up: three pixels, or no thing


@dataclass(frozen=True)
class Drawn:
    """K blocks. `blocks` [B, K * n, 16, h, w]: what has been drawn. `history`: the same, but the truth from the first
    block on that is lost [B, K]. `answers` [steps - 1, B, K, n, 16, h, w]: what all sampling steps but the last have
    made of the blocks, over that history; the truth after the first lost one."""

    blocks: Tensor
    history: Tensor
    answers: Tensor
    lost: Tensor


def draw_against(
    model: CausalWanModel, past: Tensor, embeds: Tensor, plan: Plan, target: Tensor, generator: torch.Generator
) -> Drawn:
    """What `draw` draws in the place of true blocks [B, K, n, 16, h, w]."""
    made = torch.stack(draw(model, past, embeds, plan, generator)).unflatten(2, (-1, plan.n))
    lost = ((made[-1] - target).square().flatten(2).mean(2) > LOST).cummax(1).values
    before = torch.cat((torch.zeros_like(lost[:, :1]), lost[:, :-1]), dim=1)
    history = torch.where(wide(lost), target, made[-1]).flatten(1, 2)
    return Drawn(made[-1].flatten(1, 2), history, torch.where(wide(before), target, made[:-1]), lost)


@torch.no_grad()
def draw(
    model: CausalWanModel, past: Tensor, embeds: Tensor, plan: Plan, generator: torch.Generator
) -> Sequence[Tensor]:
    """What each sampling step makes of the blocks of a plan that are not quiet, after its clean frames `past`, in the
    product's loop: [B, frames, 16, h, w]. The last of them are what is drawn."""
    batch, height, width = past.shape[0], *past.shape[-2:]
    geometry = LatentGeometry(height, width, plan.n * (plan.position(plan.blocks) // plan.n + 1), plan.n)
    cache = model.new_cache(geometry, batch, plan.retention, plan.window)
    text, zero = model.encode_text(embeds), model.encode_time(0.0)
    times = [model.encode_time(timestep) for timestep in SCHEDULE.timesteps]
    if plan.prefix:
        cache.begin_pass(0, plan.prefix)
        model.commit(past[:, : plan.prefix], zero, text, cache, 0)
    if plan.gap:
        cache.forget(keep_sinks_before=1)
    made: list[list[Tensor]] = [[] for _ in times]
    for block in range(plan.blocks):
        place, first = plan.position(block), plan.prefix + plan.n * block
        cache.begin_pass(place, plan.n)
        if block < plan.quiet:
            x = past[:, first : first + plan.n]
        else:
            x = noise_like(past.new_empty((batch, plan.n, *past.shape[2:])), generator)
            for step, time in enumerate(times):
                x = SCHEDULE.predict_x0(x, model(x, time, text, cache, place), step)
                made[step].append(x)
                if step + 1 < len(times):
                    x = SCHEDULE.renoise(x, noise_like(x, generator), step + 1)
        if block + 1 < plan.blocks:
            model.commit(x, zero, text, cache, place)
    return [torch.cat(blocks, dim=1) for blocks in made]
