"""Every policy equals plain masked attention over the whole history.

The twin keeps all clean keys and values, works out what a head may see from the rules alone, and computes a masked
softmax in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dummy.config import DummyForcingConfig, RetentionConfig
from dummy.policies.calibrated import policy_of_table
from dummy.policies.registry import policy_from_config
from dummy.policy import ContextPolicy
from dummy.presets import PRESETS, PresetName
from dummy.retentions import RetentionTable
from dummy.roles import HeadRoles, Role
from utils.memory import PeakTracker
from wan.attention.backends import sdpa
from wan.attention.cache import KVCache
from wan.attention.head_group import UNBOUNDED, CacheShape, HeadLayout, Retention
from wan.attention.varlen import ragged_backend
from wan.config import ModelKwargs

WIDTH = 6

# What heads of each role keep, (sink, recent), with C latent frames of context (L blocks); written down once more here.
KEPT = {
    "paper": lambda c: ((1, 0), (0, c), (0, 1)),
    "anchor": lambda c: ((1, 1), (0, c), (0, 1)),
    "neighbor_sink": lambda c: ((1, 0), (1, c), (0, 1)),
    "anchored": lambda c: ((1, 1), (1, c), (0, 1)),
    "traded": lambda c: ((1, 1), (1, c), (0, 0)),
    "dummy_none": lambda c: ((1, 0), (0, c), (0, 0)),
    "dummy_two": lambda c: ((1, 0), (0, c), (0, 2)),
    "static_dynamic": lambda c: ((1, 1), (1, 2 * c), (0, 1)),
}


@dataclass(frozen=True)
class Case:
    policy: str
    block: int
    blocks: int
    window: int
    sink: int
    ar_start: int
    local_blocks: int
    preset: str
    retention: tuple[tuple[int, int], ...] | None
    roles: tuple[Role, ...]
    tokens: int
    batch: int
    own: bool  # a block joins the cache from its own slots
    ragged: bool = False  # one launch for all heads
    relative: int | None = None  # the window at whose start the first frames stand
    table: tuple[tuple[int, int], ...] = ()  # calibrated: what each head keeps; roles are not looked at

    @property
    def heads(self) -> int:
        return len(self.table or self.roles)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    policy = draw(st.sampled_from(["full", "window", "prune", "packed"]))
    block = draw(st.integers(1, 3))
    sink = draw(st.integers(0, 4))
    size = st.integers(0, 5)
    custom = st.tuples(*[st.tuples(size, size)] * 3)
    return Case(
        policy,
        block,
        draw(st.integers(2, 7)),
        -1 if policy == "full" else draw(st.sampled_from([-1, *range(sink + block, sink + block + 6)])),
        sink,
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from(sorted(PRESETS))) if policy == "packed" else "paper",
        draw(st.none() | custom) if policy == "packed" else None,
        tuple(draw(st.lists(st.sampled_from(Role), min_size=1, max_size=5))),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 2)),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.none() | st.integers(1, 12)),
    )


@st.composite
def calibrated_cases(draw: st.DrawFn) -> Case:
    size = st.integers(0, 7)
    table = draw(st.lists(st.tuples(size, size) | st.just((0, UNBOUNDED)), min_size=1, max_size=6))
    return replace(draw(cases()), policy="calibrated", table=tuple(table))


def kept(case: Case, index: int, head: int) -> tuple[int, int]:
    """How many of the first and of the last earlier frames a head sees in block `index`, from the table of policies."""
    if case.policy == "calibrated":
        return case.table[head]
    role = case.roles[head]
    split = index > case.ar_start
    windowed = (0, 10**6) if case.window == -1 else (case.sink, case.window - case.sink - case.block)
    if case.policy in ("full", "window"):
        return windowed
    if case.policy == "prune":
        return (0, 0) if split and role is Role.DUMMY else windowed
    retention = case.retention or KEPT[case.preset](case.local_blocks * case.block)
    if split:
        return retention[role]
    return max(sink for sink, _ in retention), max(recent for _, recent in retention)


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """x [B, L, H, D] in float64, its first pair of channels turned by the positions [L]: all that a frame's place does
    to heads as narrow as these."""
    x, angle = x.double(), positions.double().view(-1, 1)
    even, odd = x[..., 0], x[..., 1]
    pair = (even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos())
    return torch.cat((torch.stack(pair, dim=-1), x[..., 2:]), dim=-1)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [B, L, D], k and v [B, S, D], mask [S] of bool; float64."""
    scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


@settings(max_examples=150, deadline=None)
@given(cases())
def test_policy_equals_masked_attention(case: Case) -> None:
    check_against_the_twin(case)


@settings(max_examples=100, deadline=None)
@given(calibrated_cases())
def test_a_table_of_retentions_equals_masked_attention(case: Case) -> None:
    check_against_the_twin(case)


def test_heads_that_keep_equally_many_frames_share_an_attention_call() -> None:
    rows = [[Retention(*kept) for kept in ((0, 4), (1, 0), (0, 0), (1, 3), (0, 1), (0, 4))]]
    table = RetentionTable.of(rows)
    layout = table.layout()
    (order,), (segments,) = layout.orders, layout.segments
    assert order == [2, 1, 4, 3, 0, 5]
    assert segments == [(1, Retention(0, 0)), (1, rows[0][1]), (1, rows[0][4]), (1, rows[0][3]), (2, rows[0][0])]
    cache = KVCache(1, CacheShape(1, 6, WIDTH, 2, 1, 5), Retention(0, 0), sdpa, torch.empty(0), None, layout)
    keys = torch.zeros(1, 10, 6, WIDTH)
    cache.layers[0].commit(keys, keys, range(5))
    assert [(first, stop) for first, stop, _ in cache.layers[0].state] == [(0, 1), (1, 3), (3, 6)]
    assert table.lengths() == 3 and table.mean_frames(99) == 14 / 6 and table.mean_frames(3) == 11 / 6


@pytest.mark.parametrize("local_blocks", [1, 2])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_equals_masked_attention(preset: str, local_blocks: int) -> None:
    roles = (Role.DUMMY, Role.SINK, Role.NEIGHBOR, Role.SINK, Role.DUMMY)
    check_against_the_twin(Case("packed", 3, 6, -1, 0, 1, local_blocks, preset, None, roles, 2, 1, True))


def test_every_preset_is_written_down_here_and_says_where_it_is_from() -> None:
    assert set(KEPT) == set(PRESETS) == set(get_args(PresetName))
    for preset in PRESETS.values():
        assert len(preset.source) > 20


def policy_of(case: Case) -> ContextPolicy:
    if case.policy == "calibrated":
        return policy_of_table(RetentionTable.of([[Retention(*kept) for kept in case.table]]))
    enabled = case.policy in ("prune", "packed")
    retention = RetentionConfig(*case.retention) if case.retention is not None else None
    dummy = DummyForcingConfig(
        enabled,
        case.policy if enabled else "packed",
        ar_start=case.ar_start,
        local_context_length=case.local_blocks,
        preset=case.preset,
        retention=retention,
    )
    return policy_from_config(ModelKwargs(case.window, sink_size=case.sink), dummy, case.block)


def check_against_the_twin(case: Case) -> None:
    heads, policy = case.heads, policy_of(case)
    past = (case.blocks - 1) * case.block
    shape = CacheShape(case.batch, heads, WIDTH, case.tokens, case.block, past)
    ragged = ragged_backend("varlen", torch.device("cpu"), torch.float32) if case.ragged else None
    fixed = policy.fixed_layout()
    order = list(range(heads)) if fixed is None else fixed.orders[0]
    until_split = case.ar_start * case.block if policy.split is not None and case.own else None
    cache = KVCache(
        1, shape, policy.initial, sdpa, torch.empty(0), case.relative, fixed, ragged=ragged, most=until_split
    )
    layer = cache.layers[0]
    generator = torch.Generator().manual_seed(0)
    history_k = torch.zeros(case.batch, 0, heads, WIDTH)  # as keys are before they are turned
    history_v = torch.zeros(case.batch, 0, heads, WIDTH)
    for index in range(case.blocks):
        start, stop = index * case.block, (index + 1) * case.block
        frames = torch.arange(stop).repeat_interleave(case.tokens)
        own = frames[frames >= start]
        cache.begin_pass(start, case.block)
        size = (case.batch, case.block * case.tokens, heads, WIDTH)
        noisy, clean = ([torch.randn(size, generator=generator) for _ in "qkv"] for _ in range(2))
        for q, k, v in (noisy, clean):
            q, turned_k = (turned(x, own).float() for x in (q, k))
            out = layer.attend(q[:, :, order], turned_k[:, :, order], v[:, :, order])
            for place, head in enumerate(order):
                sink, recent = kept(case, index, head)
                mask = (frames < sink) | (frames >= start - recent)
                moved = 0 if case.relative is None else max(0, stop - case.relative)
                positions = torch.where(frames < min(sink, start), frames + moved, frames)
                keys = turned(torch.cat((history_k, k), 1), positions)[:, :, head]
                values = torch.cat((history_v[:, :, head], v[:, :, head]), 1).double()
                twin = masked_attention(q[:, :, head].double(), keys, values, mask)
                torch.testing.assert_close(out[:, :, place].double(), twin, atol=1e-5, rtol=1e-5)
        if index == case.blocks - 1:
            break
        due = policy.split is not None and index == case.ar_start
        if case.own and not due:
            layer.append_current_block(range(start, stop))  # the clean pass was the last, so the block lies there
        elif not case.own:
            layer.commit(turned_k[:, :, order], clean[2][:, :, order], range(start, stop))
        history_k, history_v = torch.cat((history_k, clean[1]), 1), torch.cat((history_v, clean[2]), 1)
        if due and policy.split is not None:
            layout = policy.split.layout(HeadRoles((case.roles,)))
            cache.split(layout, range(start, stop) if case.own else range(0))
            order = list(layout.orders[0])


def test_sinks_that_stay_when_others_are_encoded_anew_are_turned_once() -> None:
    """As at a prompt switch with kept sinks, of which the later ones lie within the window."""
    shape = CacheShape(1, 2, WIDTH, 2, 1, 20)
    cache = KVCache(1, shape, Retention(3, 2), sdpa, torch.empty(0), relative_window=6)
    raw = torch.randn(1, 8 * 2, 2, WIDTH, generator=torch.Generator().manual_seed(0))
    frames = torch.arange(8).repeat_interleave(2)
    keys = turned(raw, frames).float()
    cache.layers[0].commit(keys, keys, range(8))
    cache.begin_pass(8, 1)
    cache.forget(keep_sinks_before=2)
    cache.layers[0].commit(keys[:, 4:], keys[:, 4:], range(2, 8))
    cache.begin_pass(10, 1)
    (group,) = cache.layers[0].groups
    assert group.frames[:3] == [0, 1, 2]
    torch.testing.assert_close(group.kv[0, :, 2:8].double(), turned(raw[:, :6], frames[:6] + 5), atol=1e-5, rtol=1e-5)


def test_a_split_holds_no_more_than_what_a_layer_keeps_twice() -> None:
    """Of a single layer, where it would be seen most."""
    shape = CacheShape(1, 4, 64, 100, 3, 12)
    layout = HeadLayout([[3, 1, 0, 2]], [[(2, Retention(0, 1)), (1, Retention(1, 0)), (1, Retention(0, 3))]])
    with PeakTracker() as tracker:
        cache = KVCache(1, shape, Retention(1, 3), sdpa, torch.empty(0, device="meta"), most=3)
        before = cache.bytes().total
        cache.append_current_block(range(3))
        cache.split(layout, range(3, 6))
        assert cache.bytes().total < before
    frame = 100 * 64 * 2 * 4  # of one head
    assert before == 6 * 4 * frame
    assert tracker.peak <= before + (2 * 1 + 1 + 3) * frame + frame + 1024
    assert [group.frames for group in cache.layers[0].groups] == [[5], [0], [3, 4, 5]]
