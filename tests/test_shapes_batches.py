"""What a step of training sees, and that it is computed alike wherever and by however many."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shapes.batches import BATCHES, COMMANDS, HARD, STORIES, WINDOW, Batches, DiTRecipe, Phase
from shapes.data import Clip, as_video, make_clip, pixel_frame
from shapes.dit import Flow
from shapes.dit_training import batch_loss
from shapes.forward import Plan
from shapes.linear import LinearCode
from shapes.measure import see, wrapped
from shapes.optim import Average, Optimizers
from shapes.reading import trained_text_encoder
from shapes.rollout import draw
from shapes.stories import Stories
from shapes.world import HEIGHT, WIDTH


def recipe(**changes: object) -> DiTRecipe:
    chosen = {"phases": (Phase(1.0, {3: 1.0}),), "storyboards": 1.0, "batch": 2, "elsewhere": 0.0, **changes}
    return replace(DiTRecipe(), **chosen)


def batches(chosen: DiTRecipe, folder: Path, rank: int = 0, workers: int = 1) -> Batches:
    return Batches(chosen, LinearCode.load(folder / "linear.pt"), trained_text_encoder(folder), rank, workers)


@pytest.mark.parametrize("own", [0.0, 1.0])
def test_the_loss_reaches_all_weights(own: float, shapes_work: Path) -> None:
    chosen = recipe(phases=(Phase(1.0, {7: 1.0}),), own_history=own, own_from=0.0)
    (batch, other) = batches(chosen, shapes_work)[0]
    assert batch.plan.prefix + 3 * batch.plan.blocks == 21 and batch.plan.prefix > 0 and batch.plan.blocks > 1
    assert batch.redraw == bool(own) and batch.share == other.share == 0.5
    flow = Flow()
    with torch.no_grad():
        flow.model.head.head.weight.normal_(0, 0.1)  # it begins at zero, and nothing behind it would learn
    torch.autograd.backward(batch_loss(flow, None, batch))
    grads = {name: p.grad for name, p in flow.named_parameters()}
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads.values())


@pytest.mark.parametrize("kind", [3, COMMANDS, STORIES])
def test_a_step_is_computed_where_the_model_is(kind: int, shapes_work: Path) -> None:
    """On the meta device, whose tensors meet no others, as little as a GPU's do."""
    there = torch.device("meta")
    flow, teacher = Flow().to(there), Flow().to(there)
    named = dict(flow.named_parameters())
    phases = (Phase(1.0, {kind: 1.0}),)
    chosen = recipe(phases=phases, storyboards=0.0, own_history=1.0, own_from=0.0, distill_from=0.5)
    code, text = LinearCode.load(shapes_work / "linear.pt"), trained_text_encoder(shapes_work)
    stories = Stories(code, text, part=0, batch=2)
    for step in range(0, chosen.steps, chosen.steps // 2):
        parts = batches(chosen, shapes_work)[step] or [stories.next(Flow().model, step)]
        for part in parts:
            loss = batch_loss(flow, teacher, part.to(there))
            torch.autograd.backward(loss)
            assert loss.device == there and all(p.grad is not None for p in named.values())
    matrices, rest = ([p for p in named.values() if (p.ndim == 2) == flat] for flat in (True, False))
    Optimizers(matrices, rest, 0.1, 0.1).step(1.0)
    Average(named, 0.9).update(named, step=3)
    past, embeds = part.history[:, :3].to(there), part.embeds.to(there)
    drawn = draw(flow.model, past, embeds, Plan(2, prefix=3, window=WINDOW), torch.Generator())
    assert len(drawn) == 4 and all(made.device == there and made.shape[1] == 6 for made in drawn)


@pytest.mark.parametrize("kind", [3, COMMANDS])
def test_workers_share_a_step_without_changing_it(kind: int, shapes_work: Path) -> None:
    chosen = recipe(phases=(Phase(1.0, {kind: 1.0}),), batch=4)
    alone = batches(chosen, shapes_work)[5]
    shared = [part for rank in (0, 1) for part in batches(chosen, shapes_work, rank, workers=2)[5]]
    for one, other in zip(alone, shared, strict=True):
        same = {name: getattr(other, name) for name in ("history", "target", "embeds")}
        assert all(torch.equal(getattr(one, name), value) for name, value in same.items())
        assert replace(one, **same) == other


def test_wide_batches_have_more_clips_and_each_clip_once(shapes_work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[int] = []

    def noted(seed: int, index: int, *args: Any, **more: Any) -> Clip:
        numbers.append(index)
        return make_clip(seed, index, *args, **more)

    monkeypatch.setattr("shapes.batches.make_clip", noted)
    made = batches(recipe(phases=(Phase(1.0, {1: 1.0}),), batch=None, wide=2), shapes_work)
    clips = 2 * BATCHES[1][0]
    assert [sum(len(part.target) for part in made[step]) for step in (4, 5)] == [clips, clips]
    assert len(set(numbers)) == len(numbers) == 2 * clips


def test_clips_of_commands_show_a_switch_and_the_frames_before_it(
    shapes_work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Clip] = []

    def noted(*args: Any, **more: Any) -> Clip:
        made.append(make_clip(*args, **more))
        return made[-1]

    monkeypatch.setattr("shapes.batches.make_clip", noted)
    code, text = LinearCode.load(shapes_work / "linear.pt"), trained_text_encoder(shapes_work)
    seen: set[tuple[int, int | None]] = set()
    for step in range(12):
        made.clear()
        parts = batches(recipe(phases=(Phase(1.0, {COMMANDS: 1.0}),)), shapes_work)[step]
        for clip, batch in zip(made, parts, strict=True):
            prefix, switch = batch.plan.prefix, clip.switches[-1]
            whole = code.encode(as_video(clip.video)[None])
            assert (batch.history - whole[:, switch - prefix :]).abs().max() < 1e-4
            assert torch.equal(batch.target.flatten(1, 2), batch.history[:, prefix:])
            assert batch.target.shape[1] == batch.plan.blocks
            assert torch.equal(batch.embeds, text([clip.captions[-1]]))
            assert (prefix == switch) == (batch.plan.window is None)
            seen.add((prefix, batch.plan.window))
    assert {(3, None), (WINDOW, WINDOW)} <= seen


def test_the_past_of_a_command_drifts_but_its_goal_does_not(shapes_work: Path) -> None:
    chosen = recipe(phases=(Phase(1.0, {COMMANDS: 1.0}),), own_from=0.5, drifted=1.0)
    first = chosen.steps // 2
    for step in range(first - 1, first + 6):
        made, true = (batches(one, shapes_work)[step] for one in (chosen, replace(chosen, drifted=0.0)))
        for batch, other in zip(made, true, strict=True):
            assert torch.equal(batch.target, other.target)
            assert torch.equal(other.target.flatten(1, 2), other.history[:, other.plan.prefix :])
            off = (batch.history - other.history).square().flatten(2).mean((0, 2))
            if step < first:
                assert off.sum() == 0
            else:
                assert off.min() > 0


def test_what_follows_a_command_may_be_anywhere(shapes_work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Clip] = []

    def noted(*args: Any, **more: Any) -> Clip:
        made.append(make_clip(*args, **more))
        return made[-1]

    monkeypatch.setattr("shapes.batches.make_clip", noted)
    code = LinearCode.load(shapes_work / "linear.pt")
    chosen = recipe(phases=(Phase(1.0, {COMMANDS: 1.0}),), elsewhere=1.0, own_from=1.0)
    moves = []
    for step in range(20):
        made.clear()
        for clip, batch in zip(made, batches(chosen, shapes_work)[step], strict=False):
            first = pixel_frame(clip.switches[-1] - batch.plan.prefix)
            if len(clip.film.tracks) > 1 or first > 0:
                continue
            video = code.decode(batch.history)[0].clamp(-1, 1).permute(0, 2, 3, 1).numpy() / 2 + 0.5
            seen, track = see(video), clip.film.tracks[0]
            dx, dy = wrapped(seen.x - track.x, WIDTH), wrapped(seen.y - track.y, HEIGHT)
            off = np.hypot(wrapped(dx - dx[0], WIDTH), wrapped(dy - dy[0], HEIGHT))
            assert np.median(off) < 4  # by the code of these tests, which is a rough one
            moves.append((float(dx[0]), float(dy[0])))
    assert len(moves) > 5
    assert (np.std(moves, axis=0) > (WIDTH / 6, HEIGHT / 6)).all()


def test_what_is_hard_comes_more_often_in_training_alone() -> None:
    motions = Counter(make_clip(1, i, favoured=HARD).scene.motion for i in range(400))
    usual = Counter(make_clip(1, i).scene.motion for i in range(400))
    assert all(motions[motion] > 1.3 * usual[motion] for motion in HARD)
    verbs = Counter(make_clip(1, i, (6,), favoured={"morph": 1000.0}).commands[0].verb for i in range(20))
    assert verbs["morph"] > 10
    # Figures of different times can be compared only if evaluation always asks for the same.
    held = make_clip(32, 3, (6, 12), held=True)
    assert held.captions == (
        "A tiny blue cross travels to the bottom.",
        "And now the blue plus sign goes the other way.",
        "And now the plus sign goes round in a circle.",
    )


@pytest.mark.parametrize("kind", [3, COMMANDS])
def test_another_seed_sees_other_clips(kind: int, shapes_work: Path) -> None:
    chosen = recipe(phases=(Phase(1.0, {kind: 1.0}),))
    (first, *_), (again, *_), (other, *_) = (
        batches(replace(chosen, seed=seed), shapes_work)[5] for seed in (None, None, 2)
    )
    assert torch.equal(first.history, again.history) and first.seed == again.seed
    assert first.seed != other.seed
    assert first.history.shape != other.history.shape or not torch.equal(first.history, other.history)


@pytest.mark.parametrize(
    ("blocks", "storyboards", "step", "answered"),
    [
        (COMMANDS, 0.0, 50, True),
        (COMMANDS, 0.0, 20, False),  # too early
        (3, 1.0, 50, True),
        (3, 0.0, 50, False),  # the first block's background cannot be known
        (7, 0.0, 50, False),
        (7, 0.0, 90, True),  # the first block does not count
        (3, 0.0, 90, False),  # distilled
    ],
)
def test_which_batches_have_answers(
    blocks: int, storyboards: float, step: int, answered: bool, shapes_work: Path
) -> None:
    phases = (Phase(1.0, {blocks: 1.0}),)
    for share in (0.0, 1.0):
        chosen = recipe(phases=phases, storyboards=storyboards, steps=100, own_answers=share)
        parts = batches(chosen, shapes_work)[step]
        assert [part.answered for part in parts] == [answered and share > 0] * 2


def test_what_draws_has_the_averaged_weights() -> None:
    flow, drawer = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    named = dict(flow.named_parameters())
    average = Average(named, 0.9)
    assert average.shared_with(drawer) is drawer
    assert torch.equal(drawer.weight, flow.weight)
    before = drawer.weight.detach().clone()
    with torch.no_grad():
        flow.weight += 1
    average.update(named, step=100)
    assert torch.allclose(drawer.weight, before + 0.1) and torch.equal(drawer.weight, average.values["weight"])
