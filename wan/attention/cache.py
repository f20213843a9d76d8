"""Keys and values of earlier frames: which are kept, where they lie, and how a block attends to them.

A head keeps what its `Retention` says: the first `sink` and the last `recent` frames. Heads of a layer that keep
equally much share one buffer, allocated once, and one attention call; wan.attention.head_group says what lies where in
it. With a ragged attention (wan.attention.varlen) one call does for all heads. The block is written in place before it
attends. Nothing here reads a value from the device, and nothing is concatenated in a block's passes. What a pass does
to the device follows from `KVCache.buffer_epoch` and `KVCache.state` alone, so that it can be recorded once and
replayed (wan/transformer/graphs.py). The file knows no head roles and no prompts; a policy is a retention per head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from utils.transfer import to_device
from wan.attention.backends import AttentionFn
from wan.attention.head_group import (
    AttentionCall,
    BufferEpoch,
    CacheBytes,
    CacheShape,
    CacheState,
    HeadGroup,
    HeadLayout,
    HeadOrder,
    Observer,
    Retention,
)
from wan.attention.rope import RotaryEmbedding, Rotation
from wan.attention.varlen import RaggedFn, RaggedKV


class LayerCache:
    """The cache of one layer. Its heads are in the order of `head_order`, or of the layer's weights where that is None;
    so are those of all queries, keys and values here."""

    def __init__(
        self,
        index: int,
        shape: CacheShape,
        attention: AttentionFn,
        like: Tensor,
        relative: bool,
        ragged: RaggedFn | None = None,
    ) -> None:
        self._index = index
        self._shape = shape
        self._attention = attention
        self._ragged = ragged
        self._ragged_kv: RaggedKV | None = None
        self._like = like
        self._relative = relative
        self._segments: tuple[list[tuple[int, Retention]], int] = [], 0  # that the buffers are made for, and `most`
        self.head_order: HeadOrder | None = None
        self._buffers: list[tuple[Tensor, list[HeadGroup]]] = []
        self._calls: list[AttentionCall] = []
        self.observer: Observer | None = None

    def allocate(self, head_segments: Sequence[tuple[int, Retention]], most: int) -> bool:
        """Start empty with `head_segments`: (number of heads, what they keep) in head order; no head is asked to keep
        more than `most` frames. True if the buffers are new ones; those at hand serve again if they were made for the
        same."""
        if (list(head_segments), most) == self._segments:
            self.forget(0)
            if self._ragged_kv is not None:
                self._ragged_kv.clear()
            return False
        self._build(head_segments, most)
        return True

    @torch.inference_mode(False)  # so that they can be written in any mode, whichever they were made in
    def _build(self, head_segments: Sequence[tuple[int, Retention]], most: int) -> None:
        assert sum(heads for heads, _ in head_segments) == self._shape.num_heads
        self._segments = list(head_segments), most
        self._buffers, self._calls, self._ragged_kv = [], [], None
        shape = replace(self._shape, max_past=most)
        first = 0
        alike = groupby((part for part in head_segments if part[0]), key=lambda part: shape.slots(part[1]))
        shared = [(slots, list(members)) for slots, members in alike]
        widths = [sum(heads for heads, _ in members) for _, members in shared]
        tokens = [(self._shape.frames_per_block + slots) * self._shape.tokens_per_frame for slots, _ in shared]
        buffers = self._allocate(tokens, widths)
        for buffer, width, (_, members) in zip(buffers, widths, shared, strict=True):
            groups: list[HeadGroup] = []
            for heads, retention in members:
                start = sum(group.heads.stop - group.heads.start for group in groups)
                place = slice(first + start, first + start + heads)
                part = buffer[:, :, :, start : start + heads]
                groups.append(HeadGroup(place, retention, part, shape, self._relative))
            self._buffers.append((buffer, groups))
            first += width
        self._refresh()

    def _allocate(self, tokens: Sequence[int], widths: Sequence[int]) -> list[Tensor]:
        """Buffers [2, B, tokens, heads, D], laid out as the attention wants them."""
        batch, dim = self._shape.batch, self._shape.head_dim
        if self._ragged is None:
            return [self._like.new_empty(2, batch, *size, dim) for size in zip(tokens, widths, strict=True)]
        capacities = [size for size, heads in zip(tokens, widths, strict=True) for _ in range(heads)]
        self._ragged_kv = RaggedKV.of(self._like, batch, capacities, dim, self._shape.block_tokens)
        sizes = list(zip(widths, tokens, strict=True))
        head_segments = torch.split(self._ragged_kv.kv, [heads * size for heads, size in sizes], dim=2)
        return [torch.unflatten(part, 2, size).transpose(2, 3) for part, size in zip(head_segments, sizes, strict=True)]

    @property
    def groups(self) -> list[HeadGroup]:
        return [group for _, groups in self._buffers for group in groups]

    def split(self, order: HeadOrder, head_segments: Sequence[tuple[int, Retention]], current: range) -> None:
        """Go over from one group, its heads in the order of the weights, to `head_segments` of heads in `order`. The
        frames `current` are those of the block in the own slots, if it is to join what is kept."""
        (old,) = self.groups
        assert self.head_order is None
        self.head_order = order
        parts = [part for part in head_segments if part[0]]
        places = torch.split(order.order, [heads for heads, _ in parts])
        excerpts = [old.excerpt(retention, heads, current) for (_, retention), heads in zip(parts, places, strict=True)]
        del old  # of the old buffers no more than the excerpts is there beside the new ones
        self._build(head_segments, self._shape.max_past)
        for group, excerpt in zip(self.groups, excerpts, strict=True):
            group.fill(*excerpt)
        self._refresh()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of a pass's queries to the pass itself and to what is kept; all [B, L, H, D], rotated.

        A block is written to its own slots. A longer pass (re-encoding) is joined with what is kept for this once.
        """
        own = self._shape.block_tokens
        if self._ragged is not None and self._ragged_kv is not None and q.shape[1] == own and self.observer is None:
            self.write(k, v)
            return self._ragged(q, self._ragged_kv)
        out = torch.empty_like(q) if len(self._calls) > 1 else None
        for call in self._calls:
            heads = call.heads
            if q.shape[1] == own:
                call.kv[0, :, :own] = k[:, :, heads]
                call.kv[1, :, :own] = v[:, :, heads]
                keys, values = call.kv[0, :, : call.visible], call.kv[1, :, : call.visible]
            else:
                keys = torch.cat((k[:, :, heads], call.kv[0, :, own : call.visible]), dim=1)
                values = torch.cat((v[:, :, heads], call.kv[1, :, own : call.visible]), dim=1)
            if self.observer is not None:
                self._observe(q, keys, values)
            result = self._attention(q[:, :, heads], keys, values)
            if out is None:
                return result
            out[:, :, heads] = result
        assert out is not None
        return out

    def write(self, k: Tensor, v: Tensor) -> None:
        """Put a block's keys and values into its own slots."""
        for call in self._calls:
            call.kv[0, :, : self._shape.block_tokens] = k[:, :, call.heads]
            call.kv[1, :, : self._shape.block_tokens] = v[:, :, call.heads]

    def _observe(self, q: Tensor, keys: Tensor, values: Tensor) -> None:
        assert self.observer is not None and len(self.groups) == 1
        self.observer(self._index, q, keys, self.groups[0].frames, values)

    def commit(self, k: Tensor, v: Tensor, frames: range) -> None:
        """Keep what the retentions keep of `frames`; k, v [B, len(frames) * T, H, D]."""
        for group in self.groups:
            group.commit(k[:, :, group.heads], v[:, :, group.heads], frames)
        self._refresh()

    def append_current_block(self, frames: range) -> None:
        """As `commit`, of the block whose keys and values the last pass has left in the own slots."""
        for group in self.groups:
            group.append_current_block(frames)
        self._refresh()

    def forget(self, keep_sinks_before: int) -> None:
        for group in self.groups:
            group.forget(keep_sinks_before)
        self._refresh()

    @property
    def state(self) -> tuple[tuple[int, int, int], ...]:
        if self._ragged_kv is not None:
            return ()  # what heads see is data
        return self._visible()

    def _visible(self) -> tuple[tuple[int, int, int], ...]:
        return tuple((call.heads.start, call.heads.stop, call.visible) for call in self._calls)

    def _refresh(self) -> None:
        """Recompute the attention calls after the number of kept frames may have changed."""
        before = self._visible()
        self._calls = []
        for buffer, groups in self._buffers:
            first = groups[0].heads.start
            for count, same in groupby(groups, key=lambda group: len(group.frames)):
                members = list(same)
                heads = slice(members[0].heads.start, members[-1].heads.stop)
                visible = (self._shape.frames_per_block + count) * self._shape.tokens_per_frame
                self._calls.append(
                    AttentionCall(heads, buffer[:, :, :, heads.start - first : heads.stop - first], visible)
                )
        if self._ragged_kv is not None and self._visible() != before:
            for call in self._calls:
                self._ragged_kv.set_lengths(call.heads, call.visible)


class KVCache:
    """The caches of all layers of one video (or batch of videos that share head roles)."""

    def __init__(
        self,
        num_layers: int,
        shape: CacheShape,
        retention: Retention,
        attention: AttentionFn,
        like: Tensor,
        relative_window: int | None = None,
        layout: HeadLayout | None = None,
        ragged: RaggedFn | None = None,
        most: int | None = None,
    ) -> None:
        """All heads keep `retention`, `most` as in `reset`, unless `layout` says what each keeps. `like` gives dtype
        and device; `relative_window` (frames) turns on relative positions for the sinks; with `ragged` it runs all
        heads of a block's layer at once, and `attention` what is longer."""
        self._shape = shape
        self._window = relative_window
        self.device = like.device
        self.buffer_epoch = BufferEpoch()
        self._orders: Tensor | None = None  # [2, layers, H], of which layers have their part
        self._rotary = RotaryEmbedding(shape.head_dim)
        self.layers = [
            LayerCache(index, shape, attention, like, relative_window is not None, ragged)
            for index in range(num_layers)
        ]
        if layout is None:
            self.reset(retention, most)
        else:
            self.allocate(layout)

    def reset(self, retention: Retention, most: int | None = None) -> None:
        """Forget everything; all heads of all layers, in the order of the weights, keep `retention` from now on. With
        `most` there is room for that many frames: for heads that are split, or reset, before more have come."""
        room = self._shape.max_past if most is None else min(most, self._shape.max_past)
        renewed = [layer.allocate([(self._shape.num_heads, retention)], room) for layer in self.layers]
        if any(renewed) or self._orders is not None:
            self.buffer_epoch = BufferEpoch()
        self._orders = None
        for layer in self.layers:
            layer.head_order = None

    def allocate(self, layout: HeadLayout) -> None:
        """Forget everything; heads are and keep what the layout says. Buffers at hand serve again if they suit it."""
        room = self._shape.max_past
        renewed = [layer.allocate(segments, room) for layer, segments in zip(self.layers, layout.segments, strict=True)]
        if any(renewed) or self._orders is None:
            self.buffer_epoch = BufferEpoch()
            self._orders = None
        for layer, order in zip(self.layers, self._head_orders(layout), strict=True):
            layer.head_order = order

    def split(self, layout: HeadLayout, current: range = range(0)) -> None:
        """Let heads that all kept the same go over to the layout, with what each keeps of what is there; layer by
        layer, so that no more is ever held twice than what one of them keeps.

        `current`: frames of a block whose keys and values the last pass has left in the own slots of all layers; it
        joins here, and what was kept before needs no room for it.
        """
        self.buffer_epoch = BufferEpoch()
        assert self._orders is None
        orders = self._head_orders(layout)
        for layer, order, segments in zip(self.layers, orders, layout.segments, strict=True):
            layer.split(order, segments, current)

    @torch.inference_mode()  # wherever it is called: to a compiler other tensors would be others
    def _head_orders(self, layout: HeadLayout) -> list[HeadOrder]:
        """The layout's orders on the device, for every layer; one copy for all, to where earlier ones lie if any do."""
        orders = torch.tensor(layout.orders, device="cpu")
        both = to_device(torch.stack((orders, orders.argsort(dim=1))), self.device)
        self._orders = both if self._orders is None else self._orders.copy_(both)
        return [HeadOrder(*pair) for pair in self._orders.unbind(1)]

    @property
    def block_tokens(self) -> int:
        """Tokens of a pass over one block; what is longer re-encodes earlier frames."""
        return self._shape.block_tokens

    @property
    def frames_per_block(self) -> int:
        return self._shape.frames_per_block

    @property
    def state(self) -> CacheState:
        return tuple(layer.state for layer in self.layers)

    def append_current_block(self, frames: range) -> None:
        """Let the block join the cache whose keys and values the last pass has left in the own slots of all layers."""
        for layer in self.layers:
            layer.append_current_block(frames)

    def begin_pass(self, start_frame: int, frames: int) -> None:
        """Prepare for passes over the given frames: with relative positions, turn the sinks to their new place."""
        if self._window is None:
            return
        window_start = start_frame + frames - self._window
        turns: dict[int, Rotation] = {}
        for group in (group for layer in self.layers for group in layer.groups):
            by = group.sink_shift(window_start)
            if by not in turns:
                turns[by] = self._rotary.frame_shift(by, self.device)
            group.rotate_sinks(turns[by])

    def forget(self, keep_sinks_before: int = 0) -> None:
        """Drop what is kept, except sinks that are earlier than the given frame; groups and buffers stay."""
        for layer in self.layers:
            layer.forget(keep_sinks_before)

    @contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """Within the context `observer` sees every layer's queries, keys and values before they attend."""
        for layer in self.layers:
            layer.observer = observer
        try:
            yield
        finally:
            for layer in self.layers:
                layer.observer = None

    @property
    def observing(self) -> bool:
        return self.layers[0].observer is not None

    @property
    def frames_per_head(self) -> float:
        """Earlier frames that a head sees now, as a mean over all heads."""
        groups = [group for layer in self.layers for group in layer.groups]
        seen: int = sum(len(group.frames) * (group.heads.stop - group.heads.start) for group in groups)
        return seen / (len(self.layers) * self._shape.num_heads)

    def bytes(self) -> CacheBytes:
        """Bytes that are allocated now, by purpose."""
        sizes = [group.bytes for layer in self.layers for group in layer.groups]
        kept, own, unrotated = (
            sum(column) for column in zip(*((p.kept, p.own, p.unrotated_sink_keys) for p in sizes), strict=True)
        )
        return CacheBytes(kept, own, unrotated)
