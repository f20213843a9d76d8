"""Keys and values of earlier frames: which are kept, where they lie, and how a block attends to them.

A head keeps what its `Retention` says: the first `sink` and the last `recent` frames. Heads of a layer that keep
equally much share one buffer, allocated once, and one attention call:

    [ the block's own n frames | kept slot 0 | kept slot 1 | ... ]   each slot one latent frame of T tokens

The block is written in place before it attends; kept slots fill in order, so that what is visible is always a prefix,
and a frame that leaves gives its slot to one that comes: softmax does not care about the order of keys. Which frame
lies in which slot is known on the host; nothing here reads a value from the device, and nothing is concatenated in a
block's passes. The file knows no head roles and no prompts; a policy is a retention per head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor

from wan.attention import AttentionFn
from wan.rope import RotaryEmbedding, Rotation, rotate

UNBOUNDED = 1 << 40  # a number of frames that no video reaches

Observer = Callable[[int, Tensor, Tensor, Sequence[int]], None]
"""(layer, q [B, L, H, D], keys [B, S, H, D], the frame number of every T keys), called before a layer attends."""


@dataclass(frozen=True)
class Retention:
    """The earlier frames that a head keeps: the first `sink` and the last `recent`; one that is both counts once."""

    sink: int
    recent: int

    @property
    def total(self) -> int:
        return self.sink + self.recent

    def keep(self, frames: Sequence[int]) -> Sequence[int]:
        """The frames to keep out of `frames`, which are in ascending order."""
        if len(frames) <= self.total:
            return frames
        return [*frames[: self.sink], *frames[len(frames) - self.recent :]]


FULL_HISTORY = Retention(0, UNBOUNDED)


@dataclass(frozen=True)
class CacheShape:
    """Sizes that all layers of a cache share."""

    batch: int
    num_heads: int
    head_dim: int
    tokens_per_frame: int
    frames_per_block: int
    max_past: int  # no block has more earlier frames than this; bounds what full history allocates

    def slots(self, retention: Retention) -> int:
        return min(retention.total, self.max_past)


@dataclass(frozen=True)
class CacheBytes:
    """kept: earlier frames; own: the slots of the block at work; turning: the sinks' unturned keys (relative RoPE)."""

    kept: int
    own: int
    turning: int

    @property
    def total(self) -> int:
        return self.kept + self.own + self.turning


class HeadGroup:
    """Consecutive heads of a layer with one retention.

    `kv` [2, B, (n + slots) * T, heads, D] is this group's part of a buffer that it may share with other groups;
    `frames[i]` is the latent frame in kept slot i. The sinks are always the first slots.
    """

    def __init__(self, heads: slice, retention: Retention, kv: Tensor, shape: CacheShape, relative: bool) -> None:
        self.heads = heads
        self.retention = retention
        self.kv = kv
        self.frames: list[int] = []
        self._shape = shape
        sinks = min(retention.sink, shape.slots(retention)) if relative else 0
        # With relative positions the sinks' keys turn with every block; turning the original avoids piling up rounding.
        self._unturned = kv.new_empty(kv.shape[1], sinks * shape.tokens_per_frame, *kv.shape[3:]) if sinks else None

    def _slots(self, first: int, count: int) -> slice:
        tokens = self._shape.tokens_per_frame
        begin = (self._shape.frames_per_block + first) * tokens
        return slice(begin, begin + count * tokens)

    def commit(self, k: Tensor, v: Tensor, frames: range) -> None:
        """Take over what the retention keeps of `frames`, whose keys and values are k, v [B, len(frames) * T, H, D]."""
        keep = set(self.retention.keep([*sorted(self.frames), *frames]))
        fresh = [frame for frame in frames if frame in keep]
        free = [slot for slot, frame in enumerate(self.frames) if frame not in keep]
        free += range(len(self.frames), len(self.frames) + len(fresh) - len(free))
        tokens = self._shape.tokens_per_frame
        for slot, frame, count in _runs(free, fresh):
            source = slice((frame - frames.start) * tokens, (frame - frames.start + count) * tokens)
            target = self._slots(slot, count)
            self.kv[0, :, target] = k[:, source, self.heads]
            self.kv[1, :, target] = v[:, source, self.heads]
            self.frames[slot : slot + count] = range(frame, frame + count)
        self._remember_sinks(any(slot < self.retention.sink for slot in free[: len(fresh)]))

    def _remember_sinks(self, changed: bool) -> None:
        if self._unturned is not None and changed:
            count = min(self.retention.sink, len(self.frames))
            self._unturned[:, : count * self._shape.tokens_per_frame] = self.kv[0, :, self._slots(0, count)]

    def sink_shift(self, window_start: int) -> int:
        """Positions by which the sinks move if they stand at `window_start` once that is later than their own place."""
        return max(0, window_start - self.frames[0]) if self.frames else 0

    def turn_sinks(self, shift: Rotation) -> None:
        if self._unturned is not None and self.frames:
            count = min(self.retention.sink, len(self.frames))
            sinks = self._unturned[:, : count * self._shape.tokens_per_frame]
            self.kv[0, :, self._slots(0, count)] = rotate(sinks, shift)

    @property
    def bytes(self) -> CacheBytes:
        own = self.kv[:, :, : self._shape.frames_per_block * self._shape.tokens_per_frame].nelement()
        turning = 0 if self._unturned is None else self._unturned.nelement()
        size = self.kv.element_size()
        return CacheBytes((self.kv.nelement() - own) * size, own * size, turning * size)

    def forget(self, keep_sinks_before: int) -> None:
        self.frames = [frame for frame in self.frames[: self.retention.sink] if frame < keep_sinks_before]

    def copy_from(self, source: HeadGroup, heads: Tensor) -> None:
        """Fill an empty group with what its retention keeps of `source`, taking the source's heads by index [heads]."""
        frames = self.retention.keep(sorted(source.frames))
        for slot, frame in enumerate(frames):
            old = source._slots(source.frames.index(frame), 1)
            self.kv[:, :, self._slots(slot, 1)] = source.kv[:, :, old].index_select(3, heads)
        self.frames = list(frames)
        if self._unturned is not None and source._unturned is not None:
            tokens = min(self.retention.sink, len(frames)) * self._shape.tokens_per_frame
            self._unturned[:, :tokens] = source._unturned[:, :tokens].index_select(2, heads)


def _runs(slots: Sequence[int], frames: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Pair slots with frames and join neighbours: (first slot, first frame, count) of every contiguous run."""
    pairs = list(zip(slots, frames, strict=False))
    starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(pairs)) if b != (a[0] + 1, a[1] + 1)), len(pairs)]
    return ((*pairs[a], b - a) for a, b in pairwise(starts) if b > a)


@dataclass(frozen=True)
class _Span:
    """Neighbouring groups with a common buffer and equally many frames: one attention call."""

    heads: slice
    kv: Tensor  # [2, B, (n + slots) * T, heads, D]
    visible: int  # tokens, the block's own included


class LayerCache:
    """The cache of one layer. Heads are in the order of the layer's weights."""

    def __init__(self, index: int, shape: CacheShape, attention: AttentionFn, like: Tensor, relative: bool) -> None:
        self._index = index
        self._shape = shape
        self._attention = attention
        self._like = like
        self._relative = relative
        self._buffers: list[tuple[Tensor, list[HeadGroup]]] = []
        self._spans: list[_Span] = []
        self.observer: Observer | None = None

    def allocate(self, parts: Sequence[tuple[int, Retention]]) -> None:
        """Start empty with `parts`: (number of heads, what they keep) in head order."""
        assert sum(heads for heads, _ in parts) == self._shape.num_heads
        self._buffers = []
        first = 0
        for slots, same in groupby((part for part in parts if part[0]), key=lambda part: self._shape.slots(part[1])):
            members = list(same)
            tokens = (self._shape.frames_per_block + slots) * self._shape.tokens_per_frame
            width = sum(heads for heads, _ in members)
            buffer = self._like.new_empty(2, self._shape.batch, tokens, width, self._shape.head_dim)
            groups: list[HeadGroup] = []
            for heads, retention in members:
                start = sum(group.heads.stop - group.heads.start for group in groups)
                place = slice(first + start, first + start + heads)
                part = buffer[:, :, :, start : start + heads]
                groups.append(HeadGroup(place, retention, part, self._shape, self._relative))
            self._buffers.append((buffer, groups))
            first += width
        self._refresh()

    @property
    def groups(self) -> list[HeadGroup]:
        return [group for _, groups in self._buffers for group in groups]

    def split(self, order: Sequence[int], parts: Sequence[tuple[int, Retention]]) -> None:
        """Go over from one group to `parts`; head i is from now on what head order[i] was."""
        (old,) = self.groups
        self.allocate(parts)
        for group in self.groups:
            group.copy_from(old, torch.tensor(order[group.heads], device=self._like.device))
        self._refresh()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of a pass's queries to the pass itself and to what is kept; all [B, L, H, D], rotated.

        A block is written to its own slots. A longer pass (re-encoding) is joined with what is kept for this once.
        """
        own = self._shape.frames_per_block * self._shape.tokens_per_frame
        out = torch.empty_like(q) if len(self._spans) > 1 else None
        for span in self._spans:
            heads = span.heads
            if q.shape[1] == own:
                span.kv[0, :, :own] = k[:, :, heads]
                span.kv[1, :, :own] = v[:, :, heads]
                keys, values = span.kv[0, :, : span.visible], span.kv[1, :, : span.visible]
            else:
                keys = torch.cat((k[:, :, heads], span.kv[0, :, own : span.visible]), dim=1)
                values = torch.cat((v[:, :, heads], span.kv[1, :, own : span.visible]), dim=1)
            if self.observer is not None:
                self._observe(q, keys)
            result = self._attention(q[:, :, heads], keys, values)
            if out is None:
                return result
            out[:, :, heads] = result
        assert out is not None
        return out

    def _observe(self, q: Tensor, keys: Tensor) -> None:
        assert self.observer is not None and len(self.groups) == 1
        self.observer(self._index, q, keys, self.groups[0].frames)

    def commit(self, k: Tensor, v: Tensor, frames: range) -> None:
        """Keep what the retentions keep of `frames`; k, v [B, len(frames) * T, H, D]."""
        for group in self.groups:
            group.commit(k, v, frames)
        self._refresh()

    def forget(self, keep_sinks_before: int) -> None:
        for group in self.groups:
            group.forget(keep_sinks_before)
        self._refresh()

    def _refresh(self) -> None:
        """Recompute the attention calls after the number of kept frames may have changed."""
        self._spans = []
        for buffer, groups in self._buffers:
            first = groups[0].heads.start
            for count, same in groupby(groups, key=lambda group: len(group.frames)):
                members = list(same)
                heads = slice(members[0].heads.start, members[-1].heads.stop)
                visible = (self._shape.frames_per_block + count) * self._shape.tokens_per_frame
                self._spans.append(_Span(heads, buffer[:, :, :, heads.start - first : heads.stop - first], visible))


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
    ) -> None:
        """`like` gives dtype and device; `relative_window` (frames) turns on relative positions for the sinks."""
        self._shape = shape
        self._window = relative_window
        self.device = like.device
        self._rotary = RotaryEmbedding(shape.head_dim)
        self.layers = [
            LayerCache(index, shape, attention, like, relative_window is not None) for index in range(num_layers)
        ]
        self.reset(retention)

    def reset(self, retention: Retention) -> None:
        """Forget everything; all heads of all layers keep `retention` from now on."""
        for layer in self.layers:
            layer.allocate([(self._shape.num_heads, retention)])

    def allocate(self, parts: Sequence[Sequence[tuple[int, Retention]]]) -> None:
        """Forget everything; layer l starts with parts[l]."""
        for layer, layer_parts in zip(self.layers, parts, strict=True):
            layer.allocate(layer_parts)

    def split(self, orders: Sequence[Sequence[int]], parts: Sequence[Sequence[tuple[int, Retention]]]) -> None:
        """Give every layer its head order and groups; layer by layer, so that only one is ever held twice."""
        for layer, order, layer_parts in zip(self.layers, orders, parts, strict=True):
            layer.split(order, layer_parts)

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
            group.turn_sinks(turns[by])

    def forget(self, keep_sinks_before: int = 0) -> None:
        """Drop what is kept, except sinks that are earlier than the given frame; groups and buffers stay."""
        for layer in self.layers:
            layer.forget(keep_sinks_before)

    @contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """Within the context `observer` sees every layer's queries and keys before they attend."""
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

    def bytes(self) -> CacheBytes:
        """Bytes that are allocated now, by purpose."""
        parts = [group.bytes for layer in self.layers for group in layer.groups]
        return CacheBytes(sum(p.kept for p in parts), sum(p.own for p in parts), sum(p.turning for p in parts))
