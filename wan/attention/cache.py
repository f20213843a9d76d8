"""Keys and values of earlier frames: which are kept, where they lie, and how a block attends to them.

A head keeps what its `Retention` says: the first `sink` and the last `recent` frames. Heads of a layer that keep
equally much share one buffer, allocated once, and one attention call; wan.attention.head_group says what lies where in
it. With a ragged attention (wan.attention.varlen) one call does for all heads. The block is written in place before it
attends. Nothing here reads a value from the device, and nothing is concatenated in a block's passes. What a pass does
to the device follows from `KVCache.buffer_epoch` and `KVCache.state` alone, so that it can be recorded once and
replayed (wan/transformer/graphs.py). The file knows no head roles and no prompts; a policy is a retention per head.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from utils.transfer import to_device
from wan.attention.backends import AttentionFn
from wan.attention.exchange import HeadExchange, HeadShares, share
from wan.attention.head_group import (
    BufferEpoch,
    CacheBytes,
    CacheShape,
    CacheState,
    HeadLayout,
    HeadOrder,
    Observer,
    Retention,
)
from wan.attention.layer_cache import LayerCache
from wan.attention.rope import FrameShifts
from wan.attention.varlen import RaggedFn


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
        exchange: HeadExchange | None = None,
    ) -> None:
        """All heads keep `retention`, `most` as in `reset`, unless `layout` says what each keeps. `like` gives dtype
        and device; `relative_window` (frames) turns on relative positions: sinks stand where a window of that length,
        which ends with the block at work, begins, once that is later than their own place; with `ragged` it runs all
        heads of a block's layer at once, and `attention` what is longer. With an `exchange` this is the part of one
        rank, and the layers hold its heads alone."""
        self._shape = shape
        self._exchange = exchange
        self.rank, self._ranks = (0, 1) if exchange is None else (exchange.rank, exchange.ranks)
        self.shares: HeadShares
        """Which rank has which heads, and what they keep."""
        self._window = relative_window
        self.device = like.device
        self.buffer_epoch = BufferEpoch()
        self._orders: Tensor | None = None  # [2, layers, H], of which layers have their part
        self._shifts = FrameShifts(shape.head_dim, like.device)
        self.moved = 0
        """Frames by which the pass's own queries and keys stand later than where they belong; nothing that joins the
        cache does."""
        self.layers = [
            LayerCache(index, shape, attention, like, relative_window is not None, self._shifts, ragged)
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
        self._deal(HeadShares.even(len(self.layers), self._shape.num_heads, self._ranks, retention))
        if self._allocate(room) or self._orders is not None:
            self.buffer_epoch = BufferEpoch()
        self._orders = None
        for layer in self.layers:
            layer.head_order = None

    def allocate(self, layout: HeadLayout) -> None:
        """Forget everything; heads are and keep what the layout says. Buffers at hand serve again if they suit it."""
        self._deal(self._balanced(layout))
        if self._allocate(self._shape.max_past) or self._orders is None:
            self.buffer_epoch = BufferEpoch()
            self._orders = None
        for layer, order in zip(self.layers, self._head_orders(), strict=True):
            layer.head_order = order

    def split(self, layout: HeadLayout, current: range = range(0)) -> None:
        """Let heads that all kept the same go over to the layout, with what each keeps of what is there; layer by
        layer, so that no more is ever held twice than what one of them keeps.

        `current`: frames of a block whose keys and values the last pass has left in the own slots of all layers; it
        joins here, and what was kept before needs no room for it.
        """
        self.buffer_epoch = BufferEpoch()
        assert self._orders is None
        before = self.shares
        self._deal(self._balanced(layout))
        for layer, order in zip(self.layers, self._head_orders(), strict=True):
            if self._exchange is None:
                layer.split(order, self.shares.segments(layer.index, 0), current)
            else:
                layer.split_among(self._exchange, before, self.shares, order, current)

    def _balanced(self, layout: HeadLayout) -> HeadShares:
        """The heads of every layer dealt to the ranks by what they cost."""
        own = self._shape.frames_per_block
        return HeadShares.balanced(layout, self._ranks, lambda kept: own + self._shape.slots(kept))

    def _deal(self, shares: HeadShares) -> None:
        self.shares = shares
        for layer, counts in zip(self.layers, shares.counts, strict=True):
            layer.head_counts = counts

    def _allocate(self, room: int) -> bool:
        """Let all layers hold what this rank's heads keep, of at most `room` frames; whether any buffer is new."""
        renewed = [layer.allocate(self.shares.segments(layer.index, self.rank), room) for layer in self.layers]
        return any(renewed)

    def all_heads(self, own: Tensor) -> Tensor:
        """[layers, own heads, ...] to [layers, H, ...] in the order of the weights, before heads were split."""
        if self._exchange is None:
            return own
        assert self._orders is None
        return self._exchange.all_heads(own, self.shares.heads(0, self.rank), self._shape.num_heads)

    @torch.inference_mode()  # wherever it is called: to a compiler other tensors would be others
    def _head_orders(self) -> list[HeadOrder]:
        """The heads' order on the device, for every layer; one copy for all, to where earlier ones lie if any do."""
        orders = torch.tensor(self.shares.orders, device="cpu")
        both = to_device(torch.stack((orders, orders.argsort(dim=1))), self.device)
        self._orders = both if self._orders is None else self._orders.copy_(both)
        return [HeadOrder(*pair) for pair in self._orders.unbind(1)]

    @property
    def block_tokens(self) -> int:
        """Tokens of a pass over one block; what is longer re-encodes earlier frames."""
        return self._shape.block_tokens

    @property
    def own_tokens(self) -> int:
        """Of those of a pass over one block, the ones of this rank."""
        return len(share(self.block_tokens, self._ranks, self.rank))

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

    def begin_pass(
        self,
        start_frame: int,
        frames: int,
        moved: int = 0,
        context: Collection[int] | None = None,
        sinks_at: int | None = None,
    ) -> None:
        """Prepare for passes over the given frames: with relative positions, turn the sinks to their new place.

        The block itself stands `moved` frames later than where it belongs. The passes see no other frames than
        `context`, where that is given, and the sinks stand from `sinks_at` on instead of where the window begins.
        """
        self.moved = moved
        back = self._shifts(-moved) if moved else None
        for layer in self.layers:
            layer.back, layer.context = back, context
        if self._window is None:
            return
        window_start = start_frame + frames - self._window if sinks_at is None else sinks_at
        for group in (group for layer in self.layers for group in layer.groups):
            group.place_sinks(window_start)

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
        return CacheBytes(*(sum(column) for column in zip(*sizes, strict=True)))
