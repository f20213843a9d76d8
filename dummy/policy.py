"""Context policies: what every head keeps, before and after the roles of the heads are known.

Full history, a window with sinks, prune and packed (arXiv 2601.20499, heterogeneous memory allocation) and any other
head-wise method are retentions here and nothing else; neither the cache nor attention has a branch for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dummy.config import DummyForcingConfig
from dummy.roles import HeadRoles, Role
from wan.cache import FULL_HISTORY, Retention
from wan.config import ModelKwargs

HeadParts = list[tuple[int, Retention]]
"""Consecutive heads of a layer and what they keep."""


@dataclass(frozen=True)
class HeadSplit:
    """How heads part by role.

    Roles are observed in the clean pass of block `ar_start` and hold from the next block on, or are given in `roles`.
    `from_start`: given roles hold from the first block.
    """

    by_role: Mapping[Role, Retention]
    ar_start: int
    num_dummy: int = 0
    sink_score_frames: int = 1
    query_share: float = 1.0
    roles: HeadRoles | None = None
    from_start: bool = False

    def layout(self, roles: HeadRoles) -> tuple[list[list[int]], list[HeadParts]]:
        """Per layer the order of the heads, with heads that keep equally much together, and the parts in that order."""
        ranked = sorted(Role, key=lambda role: (self.by_role[role].total, role))
        orders = [sorted(range(len(row)), key=lambda head: ranked.index(row[head])) for row in roles.table]
        parts = [[(row.count(role), self.by_role[role]) for role in ranked if role in row] for row in roles.table]
        return orders, parts


@dataclass(frozen=True)
class ContextPolicy:
    """`initial` is what all heads keep until a split, if there is one, takes over.

    `window_sinks`: sink frames that count as part of the window of `local_attn_size` frames (window and prune).
    """

    name: str
    initial: Retention
    split: HeadSplit | None = None
    window_sinks: int = 0


def base_retention(local_attn_size: int, sink: int, block: int) -> Retention:
    """All earlier frames for a size of -1; else a window of that many frames, sinks and block (`block`) included."""
    return FULL_HISTORY if local_attn_size == -1 else Retention(sink, local_attn_size - sink - block)


def prune_by_role(base: Retention) -> dict[Role, Retention]:
    """Dummy heads see nothing earlier, all others what `base` keeps."""
    return {Role.SINK: base, Role.NEIGHBOR: base, Role.DUMMY: Retention(0, 0)}


def largest(by_role: Mapping[Role, Retention]) -> Retention:
    """What all heads keep until a packed split: enough for every role."""
    return Retention(max(r.sink for r in by_role.values()), max(r.recent for r in by_role.values()))


def policy_from_config(
    window: ModelKwargs, dummy: DummyForcingConfig, block: int, roles: HeadRoles | None = None
) -> ContextPolicy:
    """The policy that the settings ask for, with blocks of `block` latent frames and given or observed roles."""
    base = base_retention(window.local_attn_size, window.sink_size, block)
    if not dummy.enabled:
        return ContextPolicy("full" if base == FULL_HISTORY else "window", base, window_sinks=base.sink)
    if dummy.policy == "prune":
        by_role = prune_by_role(base)
    else:
        by_role = {role: Retention(*kept) for role, kept in zip(Role, dummy.retentions(block), strict=True)}
    split = HeadSplit(
        by_role,
        dummy.ar_start,
        dummy.num_dummy,
        dummy.sink_score_frames,
        dummy.score_query_share,
        roles,
        from_start=roles is not None,
    )
    if dummy.policy == "prune":
        return ContextPolicy("prune", base, split, window_sinks=base.sink)
    return ContextPolicy("packed", largest(by_role), split)
