"""Packed: three classes of heads, each with a memory of its own (arXiv 2601.20499, heterogeneous memory allocation)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from dummy.config import DummyForcingConfig
from dummy.equal_cost import EqualCost
from dummy.policies.splitting import USES_ROLES, split_from
from dummy.policy import ContextPolicy, PolicyRequest
from dummy.roles import Role
from utils.errors import InputError
from wan.attention.head_group import UNBOUNDED, Retention


@dataclass(frozen=True)
class Packed:
    """Sink, neighbour and dummy heads keep what `preset` and `retention` say; `equal_cost` gives neighbour heads what
    the others save."""

    uses: ClassVar[frozenset[str]] = USES_ROLES | {"retention", "equal_cost"}

    def check(self, settings: DummyForcingConfig) -> None:
        pass

    def build(self, request: PolicyRequest) -> ContextPolicy:
        """Raises InputError for an equal cost with given roles of which none is a neighbour head's."""
        settings, block = request.settings, request.block
        by_role = {role: Retention(*kept) for role, kept in zip(Role, settings.retentions(block), strict=True)}
        _require_neighbors(request)
        packed = ContextPolicy("packed", _largest(by_role), split_from(request, by_role))
        at_frames = partial(_with_equal_cost, packed, block)
        if settings.equal_cost == "window":
            return at_frames(request.base.total)
        if settings.equal_cost == "full":
            return at_frames(UNBOUNDED)
        return replace(packed, at_frames=at_frames)


def _require_neighbors(request: PolicyRequest) -> None:
    settings, roles = request.settings, request.roles
    if settings.equal_cost is not None and roles is not None and not roles.counts()[Role.NEIGHBOR]:
        raise InputError(
            f"dummy_forcing.equal_cost: {settings.equal_cost} gives neighbor heads what the others save, but in "
            f"dummy_forcing.roles {settings.roles} no head is one; give other roles or remove the equal_cost"
        )


def _largest(by_role: Mapping[Role, Retention]) -> Retention:
    """What all heads keep until the split: enough for every role."""
    return Retention(max(r.sink for r in by_role.values()), max(r.recent for r in by_role.values()))


def _with_equal_cost(packed: ContextPolicy, block: int, frames: float) -> ContextPolicy:
    """The policy with neighbour heads that keep what is left of `frames` earlier frames a head, see `EqualCost`.

    How many that are is known when the roles are; until then all heads keep all that there is by then.
    """
    assert packed.split is not None
    until_split = (packed.split.ar_start + 1) * block
    initial = Retention(packed.initial.sink, max(packed.initial.recent, until_split))
    return replace(packed, initial=initial, split=replace(packed.split, equal_cost=EqualCost(frames)))
