"""What a sampling step learns over the model's own answers: the truth, whatever the steps before have made of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from shapes.batches import BLOCK, Batch
from shapes.dit import Flow
from shapes.dit_training import batch_loss
from shapes.forward import Plan
from shapes.schedule import SCHEDULE, wide

WRONG = 5.0  # what the first steps answer everywhere


def a_batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(2, 2, BLOCK, 16, 4, 6, generator=generator)
    plan = Plan(2, prefix=BLOCK)
    history = torch.randn(2, plan.prefix + 2 * BLOCK, 16, 4, 6, generator=generator)
    return Batch(history, target, torch.zeros(2, 4, 8), plan, copies=2, seed=7, share=1.0, early=True)


class Pass(NamedTuple):
    history: Tensor
    noisy: Tensor
    sigma: Tensor

    def noise_over(self, clean: float) -> Tensor:
        """Of the last copy, if it is `clean` that is noised there."""
        level = self.sigma[:, -1, :, None, None, None, None]
        return (self.noisy[:, -1] - (1 - level) * clean) / level

    @property
    def steps(self) -> set[int]:
        """The sampling steps whose noise levels the last copy has."""
        levels = self.sigma[:, -1].flatten().tolist()
        return {min(range(4), key=lambda i: abs(SCHEDULE.sigmas[i] - level)) for level in levels}


class Knowing:
    """A flow that points to `target`; in the passes that are to find an answer, to WRONG."""

    def __init__(self, target: Tensor) -> None:
        self.target, self.seen = target[:, None], list[Pass]()

    def __call__(self, history: Tensor, noisy: Tensor, timesteps: Tensor, *_: Any) -> Tensor:
        self.seen.append(Pass(history, noisy, timesteps / 1000))
        goal = self.target if torch.is_grad_enabled() else torch.full_like(self.target, WRONG)
        return (noisy - goal) / wide(timesteps / 1000)


def passes(batch: Batch) -> list[Pass]:
    """Of a loss, which is none for a flow that knows the truth."""
    flow = Knowing(batch.target)
    assert float(batch_loss(cast(Flow, flow), None, batch)) < 1e-6
    return flow.seen


def is_noise(x: Tensor) -> bool:
    return abs(float(x.mean())) < 0.1 and abs(float(x.std()) - 1) < 0.1


def test_without_answers_the_truth_is_noised() -> None:
    batch = a_batch()
    (one,) = passes(batch)
    level = one.sigma[:, -1, :, None, None, None, None]
    assert is_noise((one.noisy[:, -1] - (1 - level) * batch.target) / level)


def test_an_answer_is_noised_for_the_step_after_it() -> None:
    """Each of the steps before begins with the answer of the one before it, over the same history; with new noise."""
    lasts = set()
    for seed in range(12):
        *before, last = passes(replace(a_batch(), answered=True, seed=seed))
        assert last.steps == {len(before)} and is_noise(last.noise_over(WRONG))
        noises = [one.noise_over(0.0 if step == 0 else WRONG) for step, one in enumerate(before)]
        assert all(map(is_noise, noises)) and len({float(noise.sum()) for noise in noises}) == len(before)
        assert [one.steps for one in before] == [{step} for step in range(len(before))]
        assert all(one.history is last.history for one in before)
        lasts |= last.steps
    assert lasts == {1, 2, 3}


def test_a_storys_answers_are_noised_for_any_later_step() -> None:
    steps = set()
    for seed in range(12):
        (one,) = passes(replace(a_batch(), answers=torch.full((2, 2, BLOCK, 16, 4, 6), WRONG), seed=seed))
        assert is_noise(one.noise_over(WRONG))
        steps |= one.steps
    assert steps == {1, 2, 3}
