"""What the heads of a layer that keep equally much hold: earlier frames' keys and values in slots of a buffer.

    [ the block's own n frames | kept slot 0 | kept slot 1 | ... ]   each slot one latent frame of T tokens

Kept slots fill in order, so that what is visible is always a prefix, and a frame that leaves gives its slot to one that
comes: softmax does not care about the order of keys. Which frame lies in which slot is known on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from wan.attention.rope import FrameShifts, rotate
from wan.geometry import ENDLESS

UNBOUNDED = ENDLESS  # a number of frames that no video reaches


@dataclass(frozen=True)
class Retention:
    """The earlier frames that a head keeps: the first `sink` and the last `recent`; one that is both counts once.

    `rule`: what becomes of frames that leave, where they are not just forgotten.
    """

    sink: int
    recent: int
    rule: RetentionRule | None = None

    @property
    def total(self) -> int:
        return self.sink + self.recent

    def keep(self, frames: Sequence[int]) -> Sequence[int]:
        """The frames to keep out of `frames`, which are in ascending order."""
        if len(frames) <= self.total:
            return frames
        return [*frames[: self.sink], *frames[len(frames) - self.recent :]]


class RetentionRule(Protocol):
    """A hashable value that makes the groups of heads which keep frames by this rule, from `HeadGroup`'s arguments."""

    def group(
        self, heads: slice, retention: Retention, kv: Tensor, shape: CacheShape, relative: bool, shifts: FrameShifts
    ) -> HeadGroup: ...

    def check(self, retention: Retention, block: int) -> None:
        """Raises InputError where the rule has no meaning for a retention, with blocks of `block` latent frames."""


FULL_HISTORY = Retention(0, UNBOUNDED)


class HeadLayout(NamedTuple):
    """What every head of a model keeps: the first segments[l][0][0] of the heads orders[l] of layer l keep
    segments[l][0][1] (a `Retention`), the next segments[l][1][0] heads segments[l][1][1], and so on."""

    orders: Sequence[Sequence[int]]
    segments: Sequence[Sequence[tuple[int, Retention]]]


class HeadOrder(NamedTuple):
    """Head i of a layer's cache is head order[i] of the layer, and head i of the layer is head inverse[i] of the cache;
    both int64 [H] on the device, at the same address as long as the cache's buffers are the same."""

    order: Tensor
    inverse: Tensor


@dataclass(frozen=True)
class CacheShape:
    """Sizes that all layers of a cache share."""

    batch: int
    num_heads: int
    head_dim: int
    tokens_per_frame: int
    frames_per_block: int
    max_past: int  # no block has more earlier frames than this; bounds what full history allocates

    @property
    def block_tokens(self) -> int:
        return self.frames_per_block * self.tokens_per_frame

    def slots(self, retention: Retention) -> int:
        return min(retention.total, self.max_past)


class CacheBytes(NamedTuple):
    """kept: earlier frames; own: the slots of the block at work; turning: the sinks' unturned keys (relative RoPE)."""

    kept: int
    own: int
    unrotated_sink_keys: int

    @property
    def total(self) -> int:
        return self.kept + self.own + self.unrotated_sink_keys


Observer = Callable[[int, Tensor, Tensor, Sequence[int], Tensor], None]
"""(layer, q [B, L, H, D], keys [B, S, H, D] of the pass and then of earlier frames, the numbers of those frames, values
[B, S, H, D]), called before a layer attends."""


CacheState = tuple[tuple[tuple[int, int, int], ...], ...]
"""Per layer and attention call: first head, last head + 1, visible tokens."""


class BufferEpoch:
    """Stands for a cache's buffers: what was made for them, and has this as its key, is of no use once it is gone."""


@dataclass(frozen=True)
class AttentionCall:
    """Neighbouring groups with a common buffer and equally many frames: one attention call."""

    heads: slice
    kv: Tensor  # [2, B, (n + slots) * T, heads, D]
    visible: int  # tokens, the block's own included


class HeadGroup:
    """Consecutive heads of a layer with one retention.

    `kv` [2, B, (n + slots) * T, heads, D] is this group's part of a buffer that it may share with other groups;
    `frames[i]` is the latent frame in kept slot i. The sinks are always the first slots.
    """

    def __init__(
        self, heads: slice, retention: Retention, kv: Tensor, shape: CacheShape, relative: bool, shifts: FrameShifts
    ) -> None:
        """`relative`: sinks move with the window, so that their keys are kept as they came, too."""
        self.heads = heads
        self._shifts = shifts
        self.retention = retention
        self.kv = kv
        self.frames: list[int] = []
        self._shape = shape
        sinks = min(retention.sink, shape.slots(retention)) if relative else 0
        # With relative positions the sinks' keys turn with every block; turning the original avoids piling up rounding.
        self._unrotated_sinks = (
            kv.new_empty(kv.shape[1], sinks * shape.tokens_per_frame, *kv.shape[3:]) if sinks else None
        )

    def _slots(self, first: int, count: int) -> slice:
        tokens = self._shape.tokens_per_frame
        begin = (self._shape.frames_per_block + first) * tokens
        return slice(begin, begin + count * tokens)

    def commit(self, k: Tensor, v: Tensor, frames: range) -> None:
        """Take over what the retention keeps of `frames`, whose keys and values are k, v [B, len(frames) * T, heads, D]
        of this group's heads."""
        copies = self._place(frames)
        for target, source in copies:
            self.kv[0, :, target] = k[:, source]
            self.kv[1, :, target] = v[:, source]
        self._remember_sinks(copies)

    def append_current_block(self, frames: range) -> None:
        """As `commit`, of a block whose keys and values lie in the own slots."""
        copies = self._place(frames)
        for target, source in copies:
            self.kv[:, :, target] = self.kv[:, :, source]
        self._remember_sinks(copies)

    def _place(self, frames: range) -> list[tuple[slice, slice]]:
        """Give slots to what is kept of `frames`; the copies to do: tokens of the buffer, tokens of `frames`."""
        keep = set(self.retention.keep([*sorted(self.frames), *frames]))
        fresh = [frame for frame in frames if frame in keep]
        free = [slot for slot, frame in enumerate(self.frames) if frame not in keep]
        free += range(len(self.frames), len(self.frames) + len(fresh) - len(free))
        tokens = self._shape.tokens_per_frame
        copies = []
        for slot, frame, count in _runs(free, fresh):
            first = (frame - frames.start) * tokens
            copies.append((self._slots(slot, count), slice(first, first + count * tokens)))
            self.frames[slot : slot + count] = range(frame, frame + count)
        return copies

    def _remember_sinks(self, copies: Sequence[tuple[slice, slice]]) -> None:
        """Keep the keys of new sinks as they came; those of older sinks may have been turned since."""
        if self._unrotated_sinks is None:
            return
        for place, tokens in self._new_sinks(copies):
            self._unrotated_sinks[:, place] = self.kv[0, :, tokens]

    def _new_sinks(self, copies: Sequence[tuple[slice, slice]]) -> Iterator[tuple[slice, slice]]:
        """Of the copies just made those into sinks: tokens counted from the first sink, and of the buffer."""
        sinks = self._slots(0, self.retention.sink)
        for target, _ in copies:
            stop = min(target.stop, sinks.stop)
            if target.start < stop:
                yield slice(target.start - sinks.start, stop - sinks.start), slice(target.start, stop)

    def among(self, context: Collection[int]) -> Tensor:
        """Keys and values [2, B, S, heads, D] of those frames that are kept and in `context`, where they stand."""
        slots = [slot for slot, frame in enumerate(self.frames) if frame in context]
        runs = [self.kv[:, :, self._slots(slot, count)] for slot, _, count in _runs(slots, slots)]
        return torch.cat(runs, dim=2) if runs else self.kv[:, :, :0]

    def _kept_frame(self, frame: int) -> tuple[Tensor, Tensor]:
        """Keys as they came and values of a frame, both [B, T, heads, D]."""
        slot = self.frames.index(frame)
        keys, values = self.kv[:, :, self._slots(slot, 1)]
        if self._unrotated_sinks is not None and slot < self.retention.sink:
            tokens = self._shape.tokens_per_frame
            keys = self._unrotated_sinks[:, slot * tokens : (slot + 1) * tokens]
        return keys, values

    def _own_frame(self, index: int) -> tuple[Tensor, Tensor]:
        """As `_kept_frame`, of frame `index` of the block in the own slots."""
        tokens = self._shape.tokens_per_frame
        keys, values = self.kv[:, :, index * tokens : (index + 1) * tokens]
        return keys, values

    def place_sinks(self, window_start: int) -> None:
        """With relative positions: let the sinks stand at `window_start` once that is later than their own place."""
        if self._unrotated_sinks is not None and self.frames:
            count = min(self.retention.sink, len(self.frames))
            sinks = self._unrotated_sinks[:, : count * self._shape.tokens_per_frame]
            shift = self._shifts(max(0, window_start - self.frames[0]))
            self.kv[0, :, self._slots(0, count)] = rotate(sinks, shift)

    @property
    def bytes(self) -> CacheBytes:
        own = self.kv[:, :, : self._shape.block_tokens].nelement()
        unrotated_sink_keys = 0 if self._unrotated_sinks is None else self._unrotated_sinks.nelement()
        size = self.kv.element_size()
        return CacheBytes((self.kv.nelement() - own) * size, own * size, unrotated_sink_keys * size)

    def forget(self, keep_sinks_before: int) -> None:
        self.frames = [frame for frame in self.frames[: self.retention.sink] if frame < keep_sinks_before]

    def excerpt(self, retention: Retention, heads: Tensor, current: range) -> tuple[list[int], Tensor]:
        """What `retention` keeps of this group and of the block in its own slots, which is the frames `current`: the
        frames, and their keys and values [2, B, len(frames) * T, heads, D] of the heads given by index [heads]."""
        frames = list(retention.keep([*sorted(self.frames), *current]))
        tokens = self._shape.tokens_per_frame
        taken = self.kv.new_empty(2, self.kv.shape[1], len(frames) * tokens, len(heads), self.kv.shape[4])
        for index, frame in enumerate(frames):
            pair = self._own_frame(frame - current.start) if frame in current else self._kept_frame(frame)
            for target, source in zip(taken[:, :, index * tokens : (index + 1) * tokens], pair, strict=True):
                target.copy_(source.index_select(2, heads))
        return frames, taken

    def fill(self, frames: Sequence[int], kv: Tensor) -> None:
        """Start anew with these frames, all of which the retention keeps; kv [2, B, len(frames) * T, heads, D]."""
        self.kv[:, :, self._slots(0, len(frames))] = kv
        self.frames = list(frames)
        count = min(self.retention.sink, len(frames))
        if self._unrotated_sinks is not None and count:
            self._unrotated_sinks[:, : count * self._shape.tokens_per_frame] = self.kv[0, :, self._slots(0, count)]


def _runs(slots: Sequence[int], frames: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Pair slots with frames and join neighbours: (first slot, first frame, count) of every contiguous run."""
    pairs = list(zip(slots, frames, strict=False))
    starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(pairs)) if b != (a[0] + 1, a[1] + 1)), len(pairs)]
    return ((*pairs[a], b - a) for a, b in pairwise(starts) if b > a)
