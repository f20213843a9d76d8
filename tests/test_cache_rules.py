"""What becomes of frames that leave: EMA sinks, rolling sinks, positions that span more than the window, scene cuts and
rolling windows, beside plain float64 loops over the formulas."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dummy.policy import base_retention
from pipeline.config.config import load_config
from pipeline.runtime.windows import Window, one_by_one, rolling, rolling_context
from tests.test_policies import WIDTH, masked_attention, turned
from utils.errors import InputError
from wan.attention.backends import sdpa
from wan.attention.cache import KVCache
from wan.attention.ema_sink import EmaSinks
from wan.attention.head_group import CacheShape, Retention
from wan.attention.rolling_sink import RollingSinks, shown_at
from wan.attention.varlen import ragged_backend
from wan.config import ModelKwargs

HEADS, TOKENS = 2, 2


@dataclass(frozen=True)
class Case:
    block: int
    blocks: int
    window: int  # W, frames
    sink: int
    span: int | None  # P; None: absolute positions
    alpha: float | None = None
    rolling: bool = False
    cut: int | None = None  # the block that is moved
    own: bool = True
    ragged: bool = False


@st.composite
def cases(draw: st.DrawFn) -> Case:
    block, kind = draw(st.integers(1, 3)), draw(st.sampled_from(["ema", "rolling", "plain"]))
    window = block * draw(st.integers(3 if kind == "ema" else 2, 5))
    sink = {"ema": block, "rolling": 0}.get(kind, draw(st.integers(0, window - block)))
    span = None if kind == "rolling" else window + draw(st.integers(0, 4))
    blocks = draw(st.integers(2, 10))
    return Case(
        block,
        blocks,
        window,
        sink,
        span,
        draw(st.floats(0.1, 0.99)) if kind == "ema" else None,
        kind == "rolling",
        draw(st.none() | st.integers(1, blocks - 1)) if kind == "plain" else None,
        draw(st.booleans()),
        draw(st.booleans()),
    )


@dataclass
class Twin:
    """Clean keys before RoPE and values [1, T, H, D] by frame, and what the sinks are by now; float64."""

    case: Case
    keys: list[Tensor]
    values: list[Tensor]
    sinks: list[tuple[Tensor, Tensor]]

    def absorb(self, start: int) -> None:
        case = self.case
        if not self.sinks and start >= case.sink:
            self.sinks = list(zip(self.keys[: case.sink], self.values[: case.sink], strict=True))
        if case.alpha is None or start + case.block <= case.window:
            return
        for j in range(case.sink):
            leaving = start - case.window + case.sink + j
            pairs = zip(self.sinks[j], (self.keys[leaving], self.values[leaving]), strict=True)
            k, v = (case.alpha * old + (1 - case.alpha) * new for old, new in pairs)
            self.sinks[j] = k, v

    def context(self, start: int) -> list[tuple[Tensor, Tensor]]:
        """Rotated keys and values of what block `start` sees."""
        case, past = self.case, case_past(self.case)
        if case.rolling:
            shown = [(p, p if p >= start - case.block or p < past else shown_at(p, past)) for p in range(start)][-past:]
            return [(at(self.keys[m], p), self.values[m]) for p, m in shown]
        sinks = range(min(case.sink, start))
        recent = range(max(len(sinks), start - (past - case.sink)), start)
        first = 0 if case.span is None else max(0, start + case.block - case.span)
        kept = self.sinks or list(zip(self.keys, self.values, strict=True))
        seen = [(at(kept[j][0], first + j), kept[j][1]) for j in sinks]
        return seen + [(at(self.keys[f], f), self.values[f]) for f in recent]


def case_past(case: Case) -> int:
    return case.window - case.block


def at(keys: Tensor, position: int) -> Tensor:
    return turned(keys, torch.full((keys.shape[1],), position))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_rules_equal_plain_loops(case: Case) -> None:
    kwargs = ModelKwargs(case.window, sink_size=case.sink, ema_sink_alpha=case.alpha, rolling_sink=case.rolling)
    shape = CacheShape(1, HEADS, WIDTH, TOKENS, case.block, (case.blocks - 1) * case.block)
    ragged = ragged_backend("varlen", torch.device("cpu"), torch.float32) if case.ragged else None
    kept = base_retention(kwargs, case.block)
    cache = KVCache(1, shape, kept, sdpa, torch.empty(0), case.span, ragged=ragged)
    layer, twin = cache.layers[0], Twin(case, [], [], [])
    noise = torch.Generator().manual_seed(0)
    for index in range(case.blocks):
        start = index * case.block
        twin.absorb(start)
        moved = 42 if index == case.cut else 0
        cache.begin_pass(start, case.block, moved)
        positions = torch.arange(start, start + case.block).repeat_interleave(TOKENS) + moved
        context = twin.context(start)
        for _ in range(2):
            q, k, v = (torch.randn(1, case.block * TOKENS, HEADS, WIDTH, generator=noise) for _ in "qkv")
            q, rotated = (turned(x, positions).float() for x in (q, k))
            out = layer.attend(q, rotated, v)
            keys = torch.cat([*(k for k, _ in context), rotated.double()], 1)
            values = torch.cat([*(v for _, v in context), v], 1).double()
            for head in range(HEADS):
                every = torch.ones(keys.shape[1], dtype=torch.bool)
                expected = masked_attention(q[:, :, head].double(), keys[:, :, head], values[:, :, head], every)
                torch.testing.assert_close(out[:, :, head].double(), expected, atol=2e-5, rtol=2e-5)
        if index == case.blocks - 1:
            break
        if case.own:
            layer.append_current_block(range(start, start + case.block))
        else:
            layer.commit(rotated, v, range(start, start + case.block))
        twin.keys += torch.split(k.double(), TOKENS, dim=1)
        twin.values += torch.split(v.double(), TOKENS, dim=1)


def test_a_sink_moves_by_less_than_bfloat16_can_say() -> None:
    """400 updates by a thousandth of the way: two thirds of it are left, and in bfloat16 nearly all would be."""
    shape = CacheShape(1, 1, WIDTH, 1, 1, 500)
    cache = KVCache(1, shape, Retention(1, 1, EmaSinks(0.999)), sdpa, torch.empty(0, dtype=torch.bfloat16), 3)
    ones = torch.ones(1, 1, 1, WIDTH, dtype=torch.bfloat16)
    cache.layers[0].commit(0 * ones, 0 * ones, range(1))
    for frame in range(1, 402):
        cache.layers[0].commit(ones, ones, range(frame, frame + 1))
    (group,) = cache.layers[0].groups
    assert group.kv[1, 0, 1].float().mean().item() == pytest.approx(1 - 0.999**400, rel=0.01)
    assert cache.bytes().unrotated_sink_keys == 2 * WIDTH * 4


def test_a_new_video_begins_with_its_own_sinks() -> None:
    shape = CacheShape(1, 1, WIDTH, 1, 1, 9)
    cache = KVCache(1, shape, Retention(1, 1, EmaSinks(0.5)), sdpa, torch.empty(0), 3)
    for _ in range(2):
        for frame in range(4):
            filled = torch.full((1, 1, 1, WIDTH), float(frame))
            cache.layers[0].commit(filled, filled, range(frame, frame + 1))
        (group,) = cache.layers[0].groups
        assert group.kv[1, 0, 1, 0].tolist() == [1.25] * WIDTH  # 0, then half of 1, then half of 2
        cache.reset(Retention(1, 1, EmaSinks(0.5)))


def test_old_positions_show_the_first_frames_to_and_fro() -> None:
    assert [shown_at(position, 3) for position in range(3, 13)] == [2, 1, 0, 0, 1, 2, 2, 1, 0, 0]
    with pytest.raises(InputError, match="rolling_sink: the first frames take the place of old ones block by block"):
        RollingSinks().check(Retention(0, 4), 3)


def test_rounds_of_blocks() -> None:
    usual = [[window.steps for window in one.windows] for one in one_by_one(3, 1, 2, 1)]
    assert usual == [[], [(0,), (1,)], [(0,)]]
    rounds = list(rolling(3, 3))
    assert [[(w.first, w.steps, w.entering) for w in one.windows] for one in rounds] == [
        [(0, (0,), 0), (0, (1, 0), 1), (0, (2, 1, 0), 2)],
        [(1, (2, 1), None)],
        [(2, (2,), None)],
    ]


def test_what_a_rolling_window_sees() -> None:
    """Five blocks of three at work of 21 frames: six earlier ones, of which three are the first block, moved."""
    assert rolling_context(Window(0, (1, 0)), 3, 21) == ([], 0)
    assert rolling_context(Window(1, (4, 3, 2, 1, 0)), 3, 21) == ([0, 1, 2], 0)
    assert rolling_context(Window(4, (4, 3, 2, 1, 0)), 3, 21) == ([0, 1, 2, 9, 10, 11], 6)
    assert rolling_context(Window(10, (4, 3)), 3, 21) == ([0, 1, 2, *range(18, 30)], 15)


EMA, ROLLED = "model_kwargs.ema_sink_alpha=0.9", "model_kwargs.rolling_sink=true"
NO_SINK, ABSOLUTE, WITH_ROLES = "model_kwargs.sink_size=0", "rope=absolute", "dummy_forcing.enabled=true"
WINDOWS = "rolling={max_attention: 21}"
REFUSED = {
    ("model_kwargs.ema_sink_alpha=1",): "ema_sink_alpha: must be above 0 and below 1",
    (EMA, "model_kwargs.sink_size=2"): "ema_sink_alpha: frames that leave flow into the sinks",
    (EMA, "model_kwargs.local_attn_size=10"): "must be num_frame_per_block 3 and local_attn",
    (EMA, ABSOLUTE): "its positions are those of rope: relative",
    (EMA, WITH_ROLES): "policy packed says itself what heads keep",
    (EMA, ROLLED): "two answers",
    (EMA, "switch_frame_indices=[9]"): "kv_flush=true",
    (ROLLED,): "sink_size must be 0",
    (ROLLED, NO_SINK): "its positions are those of rope: absolute",
    (ROLLED, NO_SINK, ABSOLUTE, WITH_ROLES, "dummy_forcing.policy=prune"): "told apart before the first block",
    ("rope_window=8",): "do not hold model_kwargs.local_attn_size 9",
    ("rope_window=21", ABSOLUTE): "rope_window: 21 is for rope: relative",
    ("denoising_step_list_first_chunk=[1000]", "first_frame_denoising_step_list=[1000]"): "keep one of them",
    ("denoising_step_list_first_chunk=[]",): "denoising_step_list_first_chunk: empty",
    ("first_frame_denoising_step_list=[500,1000]",): "must strictly decrease",
    (WINDOWS, ABSOLUTE, "num_output_frames=9"): "fewer than the 4",
    ("rolling={max_attention: 14}", ABSOLUTE): "rolling.max_attention: 14 latent frames do not hold the 4 blocks of 3",
    (WINDOWS,): "rope: has no meaning with a rolling window",
    (WINDOWS, ABSOLUTE, WITH_ROLES): "rolling: head roles are found",
    (WINDOWS, ABSOLUTE, "switch_frame_indices=[9]"): "the blocks of a rolling window share one prompt",
    ("scene_cut_from=-1",): "scene_cut_from: ",
}


@pytest.mark.parametrize("overrides", REFUSED, ids=" ".join)
def test_what_published_programs_leave_undefined_is_refused(overrides: tuple[str, ...]) -> None:
    base = ["rope=relative", "model_kwargs.local_attn_size=9", "model_kwargs.sink_size=3", "dummy_forcing=off"]
    with pytest.raises(InputError) as caught:
        load_config({"num_output_frames": 21}, [*base, *overrides])
    assert REFUSED[overrides] in str(caught.value)


def test_the_settings_of_the_papers_are_taken() -> None:
    reward = ["rope=relative", "model_kwargs.local_attn_size=9", "model_kwargs.sink_size=3", "dummy_forcing=off"]
    assert load_config({}, [*reward, "model_kwargs.ema_sink_alpha=0.999"]).model_kwargs.ema_sink_alpha == 0.999
    deep = ["rope=relative", "model_kwargs.local_attn_size=21", "model_kwargs.sink_size=14", "rope_window=24"]
    assert load_config({}, deep).rope_window == 24
    assert load_config({}, ["model_kwargs.local_attn_size=21", "model_kwargs.rolling_sink=true", "dummy_forcing=off"])
    rolled = load_config({}, [WINDOWS, "denoising_step_list=[1000,800,600,400,200]", "dummy_forcing=off"])
    assert rolled.rolling is not None and rolled.rolling.max_attention == 21
