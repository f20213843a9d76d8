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
    """Of every head of every layer, in the order of the weights. Where other processes hold heads, as they do here what
    keeps as much does."""
    held = {group.retention: tuple(sorted(group.frames)) for layer in cache.layers for group in layer.groups}
    table = []
    for order, kept in zip(cache.shares.orders, cache.shares.kept, strict=True):
        by_head = {head: HeldFrames(one, held.get(one, ())) for head, one in zip(order, kept, strict=True)}
        table.append([by_head[head] for head in range(len(order))])
    return table
