"""A window in which old frames give way to the first ones, to and fro (Rolling Sink).

With a window of r frames before the block, the frame at position p is itself while it is of the last block, or if
p < r. Every other position shows one of the first r frames m, moved there: keys R(p - m) k_m and values v_m, where m
goes to and fro as p grows: u = p mod 2r, m = u if u < r else 2r - 1 - u. At a turn a frame is there twice, and counts
twice in the softmax.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from utils.errors import InputError
from wan.attention.head_group import UNBOUNDED, CacheBytes, CacheShape, HeadGroup, Retention
from wan.attention.rope import FrameShifts, rotate


@dataclass(frozen=True)
class RollingSinks:
    def group(
        self, heads: slice, retention: Retention, kv: Tensor, shape: CacheShape, relative: bool, shifts: FrameShifts
    ) -> HeadGroup:
        return _RollingSinkGroup(heads, retention, kv, shape, relative, shifts)

    @staticmethod
    def check(retention: Retention, block: int) -> None:
        """Raises InputError for lengths with which the rule is not defined."""
        if retention.sink or retention.recent % block or not 0 < retention.recent < UNBOUNDED:
            raise InputError(
                f"model_kwargs.rolling_sink: the first frames take the place of old ones block by block, so sink_size "
                f"must be 0 and local_attn_size a multiple of num_frame_per_block {block} from {2 * block} on"
            )


def shown_at(position: int, first: int) -> int:
    """The frame, of the `first` ones of the video, that an old position shows."""
    place = position % (2 * first)
    return place if place < first else 2 * first - 1 - place


class _RollingSinkGroup(HeadGroup):
    """`frames` are positions here; `_first` [2, B, r * T, heads, D] has the first frames for good."""

    def __init__(
        self, heads: slice, retention: Retention, kv: Tensor, shape: CacheShape, relative: bool, shifts: FrameShifts
    ) -> None:
        super().__init__(heads, retention, kv, shape, relative, shifts)
        first = min(retention.recent, shape.max_past) * shape.tokens_per_frame
        self._first = kv.new_empty(2, kv.shape[1], first, *kv.shape[3:])

    def commit(self, k: Tensor, v: Tensor, frames: range) -> None:
        self._retire_last_block()
        super().commit(k, v, frames)
        self._remember_first(frames)

    def append_current_block(self, frames: range) -> None:
        self._retire_last_block()
        super().append_current_block(frames)
        self._remember_first(frames)

    def _retire_last_block(self) -> None:
        """Put first frames in place of those that have been the last block until now."""
        first, tokens = self.retention.recent, self._shape.tokens_per_frame
        for position in sorted(self.frames)[-self._shape.frames_per_block :]:
            if position >= first:
                shown = shown_at(position, first)
                keys, values = self._first[:, :, shown * tokens : (shown + 1) * tokens]
                target = self._slots(self.frames.index(position), 1)
                self.kv[0, :, target] = rotate(keys, self._shifts(position - shown))
                self.kv[1, :, target] = values

    def _remember_first(self, frames: range) -> None:
        tokens = self._shape.tokens_per_frame
        for frame in frames:
            if frame < self.retention.recent:
                kept = self.kv[:, :, self._slots(self.frames.index(frame), 1)]
                self._first[:, :, frame * tokens : (frame + 1) * tokens] = kept

    @property
    def bytes(self) -> CacheBytes:
        plain = super().bytes
        return CacheBytes(plain.kept, plain.own, plain.unrotated_sink_keys + self._first.nbytes)
