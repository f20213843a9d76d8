"""Sinks that remember what leaves the window: an exponential moving average of it (Reward Forcing).

Whenever a block pushes frames out, frame e of them flows into sink j = e mod n, token by token of the same place:

    u_j <- a u_j + (1 - a) u_e        u: keys before RoPE; likewise the values

Sinks begin as the first n frames' own keys and values. They are kept in float32, since 1 - a = 0.001 is below half a
unit in the last place of bfloat16, in which they would hardly move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.errors import InputError
from wan.attention.head_group import CacheBytes, CacheShape, HeadGroup, Retention
from wan.attention.rope import FrameShifts, rotate


@dataclass(frozen=True)
class EmaSinks:
    """`alpha` is what a sink keeps of itself whenever a block pushes frames out, above 0 and below 1."""

    alpha: float

    def group(
        self, heads: slice, retention: Retention, kv: Tensor, shape: CacheShape, relative: bool, shifts: FrameShifts
    ) -> HeadGroup:
        return _EmaSinkGroup(heads, retention, kv, shape, shifts, self.alpha)

    @staticmethod
    def check(retention: Retention, block: int) -> None:
        """Raises InputError for lengths with which the average is not defined."""
        if retention.sink != block or retention.recent % block or not retention.recent:
            raise InputError(
                f"model_kwargs.ema_sink_alpha: frames that leave flow into the sinks block by block, so sink_size must "
                f"be num_frame_per_block {block} and local_attn_size a multiple of it from {3 * block} on; got "
                f"sink_size {retention.sink} and local_attn_size {retention.total + block}"
            )


class _EmaSinkGroup(HeadGroup):
    def __init__(
        self, heads: slice, retention: Retention, kv: Tensor, shape: CacheShape, shifts: FrameShifts, alpha: float
    ) -> None:
        super().__init__(heads, retention, kv, shape, True, shifts)
        self._alpha = alpha
        tokens = min(retention.sink, shape.slots(retention)) * shape.tokens_per_frame
        sinks = kv.new_empty(2, kv.shape[1], tokens, *kv.shape[3:], dtype=torch.float32)
        self._unrotated_sinks, self._sink_values = sinks

    def commit(self, k: Tensor, v: Tensor, frames: range) -> None:
        self._absorb(frames)
        super().commit(k, v, frames)

    def append_current_block(self, frames: range) -> None:
        self._absorb(frames)
        super().append_current_block(frames)

    def _absorb(self, frames: range) -> None:
        """Let what leaves as `frames` come flow into the sinks."""
        keep = set(self.retention.keep([*sorted(self.frames), *frames]))
        tokens, block = self._shape.tokens_per_frame, self.retention.sink
        for slot, frame in enumerate(self.frames):
            if frame in keep:
                continue
            sink = frame % block
            place = slice(sink * tokens, (sink + 1) * tokens)
            keys, values = self.kv[:, :, self._slots(slot, 1)].float()
            assert self._unrotated_sinks is not None
            self._unrotated_sinks[:, place].lerp_(rotate(keys, self._shifts(sink - frame)), 1 - self._alpha)
            self._sink_values[:, place].lerp_(values, 1 - self._alpha)
            self.kv[1, :, self._slots(sink, 1)] = self._sink_values[:, place]

    def _remember_sinks(self, copies: Sequence[tuple[slice, slice]]) -> None:
        super()._remember_sinks(copies)
        for place, tokens in self._new_sinks(copies):
            self._sink_values[:, place] = self.kv[1, :, tokens]

    def fill(self, frames: Sequence[int], kv: Tensor) -> None:
        super().fill(frames, kv)
        count = min(self.retention.sink, len(frames))
        self._sink_values[:, : count * self._shape.tokens_per_frame] = self.kv[1, :, self._slots(0, count)]

    @property
    def bytes(self) -> CacheBytes:
        plain = super().bytes
        values = self._sink_values
        assert self._unrotated_sinks is not None
        sinks = (values.nelement() + self._unrotated_sinks.nelement()) * values.element_size()
        return CacheBytes(plain.kept, plain.own, sinks)
