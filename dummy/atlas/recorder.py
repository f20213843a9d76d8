"""Watches whole videos being made and keeps what heads looked at in chosen passes (an observer, see
wan.attention.cache). Nothing is read from the device until a video is finished.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from torch import Tensor

from dummy.frame_attention import FrameAttention
from dummy.passes import PassCount


class PassRecorder:
    """One `FrameAttention` for each of the `wanted` passes (block, place in the block) of the video at hand, whose
    passes a new `count` tells apart."""

    def __init__(
        self,
        wanted: Collection[tuple[int, int]],
        count: Callable[[], PassCount],
        tokens_per_frame: int,
        query_share: float,
    ) -> None:
        self._wanted = wanted
        self._new_count = count
        self._tokens = tokens_per_frame
        self._query_share = query_share
        self.begin()

    def begin(self) -> None:
        """Forget; the next pass is the first of a new video."""
        self._count = self._new_count()
        self.seen: dict[tuple[int, int], FrameAttention] = {}

    def __call__(self, layer: int, q: Tensor, keys: Tensor, context: Sequence[int], values: Tensor) -> None:
        self._count.see(layer)
        if self._count.key not in self._wanted:
            return
        if self._count.key not in self.seen:
            self.seen[self._count.key] = FrameAttention(self._tokens, self._query_share, with_entropy=True, most=None)
        self.seen[self._count.key](layer, q, keys, context)
