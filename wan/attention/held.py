"""What every head of a cache keeps and holds, for people to look at: from host values alone, so nothing waits."""

from __future__ import annotations

from typing import NamedTuple

from wan.attention.cache import KVCache
from wan.attention.head_group import Retention


class HeldFrames(NamedTuple):
    """What a head is to keep, and which earlier latent frames it holds now, in ascending order."""

    retention: Retention
    frames: tuple[int, ...]


def held_by_head(cache: KVCache) -> list[list[HeldFrames]]:
    """Of every head of every layer, in the order of the weights, those of other processes too: what keeps as much holds
    the same."""
    held = {group.retention: tuple(sorted(group.frames)) for layer in cache.layers for group in layer.kinds}
    table = []
    for order, kept in zip(cache.shares.orders, cache.shares.kept, strict=True):
        by_head = {head: HeldFrames(one, held[one]) for head, one in zip(order, kept, strict=True)}
        table.append([by_head[head] for head in range(len(order))])
    return table
