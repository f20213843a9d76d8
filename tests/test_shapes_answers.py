"""What a sampling step learns over the model's own answers: the truth, whatever the steps before have made of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from shapes.batches import BLOCK, Batch
from shapes.dit import Flow
from shapes.dit_training import batch_loss
from shapes.forward import Plan
from shapes.schedule import SCHEDULE

WRONG = 5.0  # what the first steps answer everywhere


def a_batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(2, 2, BLOCK, 16, 4, 6, generator=generator)
    plan = Plan(2, prefix=BLOCK)
    history = torch.randn(2, plan.prefix + 2 * BLOCK, 16, 4, 6, generator=generator)
    return Batch(history, target, torch.zeros(2, 4, 8), plan, copies=2, seed=7, share=1.0, early=True)


class Knowing:
    """A flow that points to `target`; in the passes that are to find an answer, to WRONG."""

    def __init__(self, target: Tensor) -> None:
        self.target, self.seen = target[:, None], list[tuple[Tensor, Tensor]]()

    def __call__(self, history: Tensor, noisy: Tensor, timesteps: Tensor, *_: Any) -> Tensor:
        sigma = timesteps[..., None, None, None, None] / 1000
        self.seen.append((noisy, timesteps / 1000))
        goal = self.target if torch.is_grad_enabled() else torch.full_like(self.target, WRONG)
        return (noisy - goal) / sigma


def loss(batch: Batch) -> tuple[float, Knowing]:
    flow = Knowing(batch.target)
    return float(batch_loss(cast(Flow, flow), None, batch)), flow


@pytest.mark.parametrize("own", [{}, {"answered": True}, {"answers": torch.full((2, 2, BLOCK, 16, 4, 6), WRONG)}])
def test_the_truth_is_the_goal_over_any_answer(own: dict[str, Any]) -> None:
    found, flow = loss(replace(a_batch(), **own))
    assert found < 1e-6
    noisy, sigma = flow.seen[-1]
    if own:  # the last copy is the answer, noised for a later step
        level = sigma[:, -1, :, None, None, None, None]
        noise = (noisy[:, -1] - (1 - level) * WRONG) / level
        assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
        steps = {
            min(range(4), key=lambda i: abs(SCHEDULE.sigmas[i] - value)) for value in sigma[:, -1].flatten().tolist()
        }
        assert 0 not in steps
    if own.get("answered"):
        assert steps == {len(flow.seen) - 1}  # after so many steps of its own
