"""Stories are drawn as the product draws videos, take switches where they are, and go on where they were stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dummy.policy import ContextPolicy
from pipeline.runtime.generator import BlockGenerator, GeneratorSettings, Segment
from shapes.batches import Batch
from shapes.data import as_video
from shapes.dit import Flow, TextEncoder
from shapes.dit_training import batch_loss
from shapes.drawing import render
from shapes.following import shifted
from shapes.forward import Plan, TrainingForward, init_
from shapes.linear import LinearCode
from shapes.rollout import draw
from shapes.schedule import SCHEDULE, end_of
from shapes.stories import BLOCK, TURN, WINDOW, Stories
from shapes.vae import fit_linear_code
from wan.attention.head_group import Retention
from wan.config import ModelConfig
from wan.geometry import LatentGeometry
from wan.transformer.model import CausalWanModel

CONFIG = ModelConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=16, text_dim=12, text_len=7)


class Noise:
    """The loop's noise, from a generator in the order in which it is asked for."""

    def __init__(self, seed: int, batch: int) -> None:
        self._generator, self._batch = torch.Generator().manual_seed(seed), batch

    def normal(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(self._batch, *shape, generator=self._generator)


@pytest.mark.parametrize(("switch", "blocks"), [(None, 1), (12, 4), (15, 5)])
def test_blocks_are_drawn_as_the_products_loop_draws_them(switch: int | None, blocks: int) -> None:
    """At a video's beginning, and after a switch behind `blocks` blocks."""
    net = init_(CausalWanModel(CONFIG), 3)
    torch.nn.init.normal_(net.head.head.weight, 0.0, 0.3, generator=torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(5)
    past = torch.randn(2, 3 * blocks, 16, 4, 4, generator=generator)
    embeds = torch.randn(2, 2, 7, 12, generator=generator)
    window = ContextPolicy("window", Retention(1, WINDOW - 1 - BLOCK), window_sinks=1)
    settings = GeneratorSettings(SCHEDULE, window, window=WINDOW, relative_rope=True)
    with torch.inference_mode():
        texts = [net.encode_text(embeds[0]), net.encode_text(embeds[1])]
    segments = [Segment(0, texts[0]), *([Segment(switch, texts[1])] if switch else [])]
    geometry = LatentGeometry(4, 4, 3 * (blocks + TURN), 3)
    rollout = BlockGenerator(net, settings).start(geometry, segments, Noise(6, 2), 2, prefix_latents=past)
    expected = torch.cat([block.latents for block in rollout.blocks()][blocks:], dim=1)
    plan = Plan(TURN, prefix=min(3 * blocks, WINDOW), window=WINDOW)
    words, noise = embeds[int(switch is not None)], torch.Generator().manual_seed(6)
    *_, found = draw(net, past[:, -plan.prefix :], words, plan, noise)
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("plan", [Plan(2 * TURN, WINDOW, TURN, WINDOW, True), Plan(4, 3, 2, WINDOW, True), Plan(3, 6)])
def test_blocks_are_drawn_as_the_training_sees_them(plan: Plan) -> None:
    """After quiet blocks, and behind a gap: their first step's answers are those of all blocks at once."""
    net = init_(CausalWanModel(CONFIG), 3)
    torch.nn.init.normal_(net.head.head.weight, 0.0, 0.3, generator=torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(5)
    past = torch.randn(2, plan.prefix + BLOCK * plan.quiet, 16, 4, 4, generator=generator)
    embeds = torch.randn(2, 7, 12, generator=generator)
    first, *_, last = draw(net, past, embeds, plan, torch.Generator().manual_seed(6))
    same = torch.Generator().manual_seed(6)
    noise = [torch.randn(4, 2, BLOCK, 16, 4, 4, generator=same) for _ in range(plan.blocks - plan.quiet)]
    noisy = torch.stack([steps[0] for steps in noise], dim=1)[:, None]
    sigma = torch.ones(noisy.shape[:3])
    with torch.no_grad():
        flow = TrainingForward(net)(torch.cat((past, last), dim=1), noisy, 1000 * sigma, embeds, plan)
    assert (end_of(flow, noisy, sigma).flatten(1, 3) - first).abs().max() < 1e-3


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> LinearCode:
    return fit_linear_code(Path(tmp_path_factory.mktemp("code")), clips=4)


def turns(stories: Stories, flow: Flow, steps: range) -> list[Batch]:
    return [stories.next(flow.model, step) for step in steps]


def test_stories_go_on_where_they_were_stopped(code: LinearCode) -> None:
    flow, text = Flow(), TextEncoder().requires_grad_(False)
    whole, first, second = (Stories(code, text, 1, batch=2, later_seeds=100) for _ in range(3))
    turns(whole, flow, range(2))
    turns(first, flow, range(2))
    second.restore(first.state())
    for one, other in zip(turns(whole, flow, range(2, 4)), turns(second, flow, range(2, 4)), strict=True):
        tensors = {name: value for name, value in vars(other).items() if isinstance(value, Tensor)}
        assert all(torch.equal(getattr(one, name), value) for name, value in tensors.items())
        assert replace(one, **tensors) == other
    (usual,) = turns(Stories(code, text, 1, batch=2), flow, range(3, 4))
    assert usual.seed != one.seed and not torch.equal(usual.target, one.target)
    here, there = (
        Stories(code, text, 1, 2, later)._begin(np.random.default_rng(3), 0, fresh=True) for later in (0, 100)
    )
    assert here.first == there.first and here.clips[0].scene != there.clips[0].scene


def test_a_story_is_told_turn_by_turn(code: LinearCode) -> None:
    """Of one group: its captions change with its switches, where the last frames become the prefix; a model that knows
    nothing is put right every time, so that the history is the film's."""
    flow, text = Flow(), TextEncoder().requires_grad_(False)
    stories, rng = Stories(code, text, 0, batch=2), np.random.default_rng(2)
    group = next(group for group in (stories._begin(rng, step, fresh=True) for step in range(50)) if group.switches)
    (clip,) = group.clips
    plans = []
    while group.at < min(group.length, group.switches[0] + 3 * BLOCK * TURN):
        at, prefix = group.at, group.prefix
        batch = stories._turn(group, flow.model, rng)
        plans.append((at, batch.plan))
        caption = clip.captions[sum(switch <= at for switch in clip.switches)]
        assert torch.equal(batch.embeds, text([caption]))
        if at in clip.switches:
            assert torch.equal(group.prefix, batch.history[:, :WINDOW]) and group.prefix.shape[1] == WINDOW
        else:
            assert torch.equal(group.prefix, prefix)
        truth = stories._truth(group, at, at + BLOCK * TURN)
        assert torch.equal(batch.target.flatten(1, 2), truth)
        assert torch.equal(batch.history[:, -BLOCK * TURN :], truth)
        assert batch.history.shape[1] >= batch.plan.clean
    assert plans[0] == (BLOCK, Plan(TURN, prefix=BLOCK, window=WINDOW))
    assert (group.switches[0], Plan(TURN, prefix=WINDOW, window=WINDOW)) in plans
    assert all(plan.gap == (at not in (BLOCK, *group.switches)) for at, plan in plans)
    torch.autograd.backward(batch_loss(flow, None, batch))
    head = flow.model.head.head.weight.grad
    assert head is not None and head.abs().max() > 0


def test_a_model_learns_to_mend_what_its_steps_have_made(code: LinearCode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shapes.rollout.LOST", float("inf"))
    monkeypatch.setattr("shapes.stories.OWN", 1.0)
    flow, text = Flow(), TextEncoder().requires_grad_(False)
    stories, rng = Stories(code, text, 0, batch=2), np.random.default_rng(2)
    group = stories._begin(rng, 0, fresh=True)
    batch = stories._turn(group, flow.model, rng)
    assert batch.answers is not None and batch.answers.shape == (3, *batch.target.shape)
    drawn = batch.history[:, -BLOCK * TURN :].unflatten(1, (-1, BLOCK))
    for made in (*batch.answers, drawn):  # by a model that knows nothing
        assert (made - batch.target).square().flatten(3).mean(3).min() > 0.1


def test_a_story_goes_on_from_where_things_are_drawn(code: LinearCode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its truth too, until it is lost; then it is put right where it was."""
    move, drawn, empty = (5.0, -4.0), list[Tensor](), False

    def draw(*given: object) -> list[Tensor]:
        truth = stories._code.encode_later(torch.stack([as_video(render(shifted(film, [move]))) for film in films]))
        drawn.append(torch.zeros_like(truth) if empty else truth)
        return [drawn[-1]] * 4

    monkeypatch.setattr("shapes.rollout.draw", draw)
    monkeypatch.setattr("shapes.stories.OWN", 1.0)
    flow, text = Flow(), TextEncoder().requires_grad_(False)
    stories, rng = Stories(code, text, 0, batch=2), np.random.default_rng(2)
    groups = (stories._begin(rng, step, fresh=True) for step in range(50))
    group = next(group for group in groups if not group.switches and group.length > 6 * BLOCK * TURN)
    (clip,) = group.clips
    assert len(clip.film.tracks) == 1
    for turn in (1, 2):
        films = group.films(group.at, group.at + BLOCK * TURN)
        expected = stories._truth(group, group.at, group.at + BLOCK * TURN)
        batch = stories._turn(group, flow.model, rng)
        assert torch.equal(batch.target.flatten(1, 2), expected)
        assert torch.equal(group.recent[:, -BLOCK * TURN :], drawn[-1]) and group.age == [turn]
        assert group.shifts == [[pytest.approx([turn * way for way in move], abs=1.5)]]
    films, before = group.films(group.at, group.at + BLOCK * TURN), group.shifts
    empty = True
    batch = stories._turn(group, flow.model, rng)
    assert torch.equal(group.recent[:, -BLOCK * TURN :], batch.target.flatten(1, 2))
    assert group.age == [0] and stories.ages == [2] and group.shifts == before
    films = group.films(group.at, group.at + BLOCK * TURN)
    films, empty = [replace(film, backdrop=np.roll(film.backdrop, 1, axis=1)) for film in films], False
    batch = stories._turn(group, flow.model, rng)  # the things are found, but before another background
    assert torch.equal(group.recent[:, -BLOCK * TURN :], batch.target.flatten(1, 2))
    assert stories.ages == [2, 0] and group.shifts == before
    monkeypatch.setattr("shapes.stories.LOST", -1.0)
    films = group.films(group.at, group.at + BLOCK * TURN)
    batch = stories._turn(group, flow.model, rng)  # the things are found, but look too different
    assert torch.equal(group.recent[:, -BLOCK * TURN :], batch.target.flatten(1, 2))
    assert stories.ages == [2, 0, 0] and group.shifts == before
