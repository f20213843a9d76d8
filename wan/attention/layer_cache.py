"""The cache of one layer: its groups of heads, their buffers, and the attention calls over them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from wan.attention.backends import AttentionFn
from wan.attention.exchange import HeadExchange, HeadShares
from wan.attention.head_group import AttentionCall, CacheShape, HeadGroup, HeadOrder, Observer, Retention
from wan.attention.rope import FrameShifts, Rotation, rotate
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
        shifts: FrameShifts,
        ragged: RaggedFn | None = None,
    ) -> None:
        self.index = index
        self._shape = shape
        self._attention = attention
        self._ragged = ragged
        self._ragged_kv: RaggedKV | None = None
        self._like = like
        self._relative = relative
        self._shifts = shifts
        self._segments: tuple[list[tuple[int, Retention]], int] = [], 0  # that the buffers are made for, and `most`
        self.head_order: HeadOrder | None = None
        self.head_counts: Sequence[int] = ()  # of every rank, where heads are dealt to several
        self._buffers: list[tuple[Tensor, list[HeadGroup]]] = []
        self._headless: list[HeadGroup] = []
        self._calls: list[AttentionCall] = []
        self.observer: Observer | None = None
        self.back: Rotation | None = None  # what turns the pass's own keys to where they belong
        self.context: Collection[int] | None = None  # the frames, of those that are kept, that the pass may see

    def allocate(self, head_segments: Sequence[tuple[int, Retention]], most: int) -> bool:
        """Start empty with `head_segments`: (number of heads, what they keep) in head order, where no heads stand for
        those of another rank, of which it is known what they hold; no head is asked to keep more than `most` frames.
        True if the buffers are new ones; those at hand serve again if they were made for the same."""
        if (list(head_segments), most) == self._segments:
            self.forget(0)
            if self._ragged_kv is not None:
                self._ragged_kv.clear()
            return False
        self._build(head_segments, most)
        return True

    @torch.inference_mode(False)  # so that they can be written in any mode, whichever they were made in
    def _build(self, head_segments: Sequence[tuple[int, Retention]], most: int) -> None:
        self._segments = list(head_segments), most
        self._buffers, self._headless, self._calls, self._ragged_kv = [], [], [], None
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
                make = HeadGroup if retention.rule is None else retention.rule.group
                groups.append(make(place, retention, part, shape, self._relative, self._shifts))
            self._buffers.append((buffer, groups))
            first += width
        for _, retention in (part for part in head_segments if not part[0]):
            tokens_of = (shape.frames_per_block + shape.slots(retention)) * shape.tokens_per_frame
            nothing = self._like.new_empty(2, shape.batch, tokens_of, 0, shape.head_dim)
            self._headless.append(HeadGroup(slice(0, 0), retention, nothing, shape, False, self._shifts))
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

    @property
    def kinds(self) -> list[HeadGroup]:
        """The groups, and those of other ranks' heads, which have frames alone."""
        return [*self.groups, *self._headless]

    def split(self, order: HeadOrder, head_segments: Sequence[tuple[int, Retention]], current: range) -> None:
        """Go over from one group, its heads in the order of the weights, to `head_segments` of heads in `order`. The
        frames `current` are those of the block in the own slots, if it is to join what is kept."""
        (old,) = self.groups
        assert self.head_order is None
        if current:
            self._move_back()
        self.head_order = order
        parts = [part for part in head_segments if part[0]]
        places = torch.split(order.order, [heads for heads, _ in parts])
        excerpts = [old.excerpt(retention, heads, current) for (_, retention), heads in zip(parts, places, strict=True)]
        del old  # of the old buffers no more than the excerpts is there beside the new ones
        self._build(head_segments, self._shape.max_past)
        for group, excerpt in zip(self.groups, excerpts, strict=True):
            group.fill(*excerpt)
        self._refresh()

    def split_among(
        self, exchange: HeadExchange, before: HeadShares, after: HeadShares, order: HeadOrder, current: range
    ) -> None:
        """As `split`, where heads go over to other ranks too, with what they keep from now on."""
        (group,) = self.groups
        if current:
            self._move_back()
        segments = after.segments(self.index, exchange.rank)
        kinds = {*after.kept[self.index], *(kept for _, kept in segments)}
        frames = {kept: list(kept.keep([*sorted(group.frames), *current])) for kept in kinds}
        one = 2 * self._shape.batch * self._shape.tokens_per_frame * self._shape.head_dim  # numbers a head and frame

        def excerpt(head: int, kept: Retention) -> Tensor:
            return self.groups[0].excerpt(kept, order.order.new_tensor([head]), current)[1].flatten()

        moved = exchange.move_heads(self.index, before, after, excerpt, lambda kept: one * len(frames[kept]))
        by_head = [flat.view(2, self._shape.batch, -1, 1, self._shape.head_dim) for flat in moved]
        del group  # of the old buffers no more than the excerpts is there beside the new ones
        self.head_order = order
        self._build(segments, self._shape.max_past)
        for group in self.groups:
            group.fill(frames[group.retention], torch.cat(by_head[group.heads], dim=3))
        for group in self._headless:
            group.frames = frames[group.retention]
        self._refresh()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of a pass's queries to the pass itself and to what is kept; all [B, L, H, D], rotated.

        A block is written to its own slots. A longer pass (re-encoding) is joined with what is kept for this once.
        """
        own = self._shape.block_tokens
        if self.context is not None:
            return self._attend_to(self.context, q, k, v)
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

    def _attend_to(self, context: Collection[int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `attend`, to the pass itself and to no other frames than `context`."""
        out = torch.empty_like(q)
        for group in self.groups:
            heads = group.heads
            seen = group.among(context)
            keys, values = (torch.cat((new[:, :, heads], old), 1) for new, old in zip((k, v), seen, strict=True))
            out[:, :, heads] = self._attention(q[:, :, heads], keys, values)
        return out

    def write(self, k: Tensor, v: Tensor) -> None:
        """Put a block's keys and values into its own slots."""
        for call in self._calls:
            call.kv[0, :, : self._shape.block_tokens] = k[:, :, call.heads]
            call.kv[1, :, : self._shape.block_tokens] = v[:, :, call.heads]

    def _observe(self, q: Tensor, keys: Tensor, values: Tensor) -> None:
        assert self.observer is not None and len(self.groups) == 1
        self.observer(self.index, q, keys, self.groups[0].frames, values)

    def commit(self, k: Tensor, v: Tensor, frames: range) -> None:
        """Keep what the retentions keep of `frames`; k, v [B, len(frames) * T, H, D]."""
        k = k if self.back is None else rotate(k, self.back)
        for group in self.kinds:
            group.commit(k[:, :, group.heads], v[:, :, group.heads], frames)
        self._refresh()

    def append_current_block(self, frames: range) -> None:
        """As `commit`, of the block whose keys and values the last pass has left in the own slots."""
        self._move_back()
        for group in self.kinds:
            group.append_current_block(frames)
        self._refresh()

    def _move_back(self) -> None:
        """Turn the keys in the own slots to where they belong."""
        if self.back is None:
            return
        for buffer, _ in self._buffers:
            own = buffer[0, :, : self._shape.block_tokens]
            own.copy_(rotate(own, self.back))

    def forget(self, keep_sinks_before: int) -> None:
        for group in self.kinds:
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
