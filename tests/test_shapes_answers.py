"""What a sampling step learns over the model's own answers: the truth, whatever the steps before have made of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, cast

import pytest
import torch
from torch import Tensor

from shapes.batches import BLOCK, Batch
from shapes.dit import Flow
from shapes.dit_training import batch_loss
from shapes.forward import Plan
from shapes.rollout import draw_against
from shapes.schedule import SCHEDULE, wide
from wan.transformer.model import CausalWanModel

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
        self.target, self.seen, self.model = target[:, None], list[Pass](), "a model"

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


def test_given_answers_are_noised_for_the_step_after_each() -> None:
    answers = torch.stack([torch.full((2, 2, BLOCK, 16, 4, 6), WRONG * step) for step in (1, 2, 3)])
    steps = set()
    for seed in range(12):
        (one,) = passes(replace(a_batch(), answers=answers, seed=seed))
        (step,) = one.steps
        assert is_noise(one.noise_over(WRONG * step))
        steps.add(step)
    assert steps == {1, 2, 3}


def test_after_a_switch_blocks_are_drawn_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the history, and what each step has made of them is mended by the next one; the frames before the switch
    stay."""
    batch, given = replace(a_batch(), redraw=True), []
    truth = batch.target.flatten(1, 2)

    def drawn(model: object, past: Tensor, embeds: Tensor, plan: Plan, _: torch.Generator) -> list[Tensor]:
        given.append((model, past, embeds, plan))
        return [torch.full_like(truth, WRONG * step) for step in (1, 2, 3, 4)]

    monkeypatch.setattr("shapes.rollout.draw", drawn)
    monkeypatch.setattr("shapes.rollout.LOST", float("inf"))
    (one,) = passes(batch)
    (step,) = one.steps
    assert is_noise(one.noise_over(WRONG * step))
    ((model, past, embeds, plan),) = given
    assert model == "a model" and torch.equal(past, batch.history[:, :BLOCK])
    assert torch.equal(embeds, batch.embeds) and plan == batch.plan
    expected = torch.cat((past, torch.full_like(truth, 4 * WRONG)), dim=1)
    off = (one.history - expected).abs()
    assert 0 < float(off.mean()) < 0.15 * 4 * WRONG  # a little noisy


def test_blocks_that_are_lost_are_put_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the history from the first lost one on; what has been made of that one itself is still to be mended."""
    truth = torch.zeros(2, 3 * BLOCK, 16, 4, 6)
    made = [torch.full_like(truth, 0.1 * step) for step in (1, 2, 3, 4)]
    made[-1][1, BLOCK : 2 * BLOCK] = 1.0
    monkeypatch.setattr("shapes.rollout.draw", lambda *_: made)
    plan = Plan(3, prefix=BLOCK)
    target = truth.unflatten(1, (-1, BLOCK))
    found = draw_against(cast(CausalWanModel, None), truth, truth, plan, target, torch.Generator())
    assert found.lost.tolist() == [[False, False, False], [False, True, True]]
    blocks = found.history.unflatten(1, (-1, BLOCK))[:, :, 0, 0, 0, 0]
    assert torch.allclose(blocks, torch.tensor([[0.4, 0.4, 0.4], [0.4, 0.0, 0.0]]))
    answers = found.answers[:, 1, :, 0, 0, 0, 0]
    assert torch.allclose(answers, torch.tensor([[0.1, 0.1, 0.0], [0.2, 0.2, 0.0], [0.3, 0.3, 0.0]]))
