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
    """Of every head of every layer, in the order of the weights."""
    table = []
    for index, layer in enumerate(cache.layers):
        row: dict[int, HeldFrames] = {}
        for group in layer.groups:
            held = HeldFrames(group.retention, tuple(sorted(group.frames)))
            for place in range(group.heads.start, group.heads.stop):
                row[place if cache.host_orders is None else cache.host_orders[index][place]] = held
        table.append([row[head] for head in sorted(row)])
    return table
