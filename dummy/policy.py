"""Context policies: what every head keeps, before and after the roles of the heads are known.

Full history, a window with sinks, prune and packed (arXiv 2601.20499, heterogeneous memory allocation), calibrated and
any other head-wise method are retentions here and nothing else; neither the cache nor attention has a branch for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from dummy.budget import DummyBudget
from dummy.calibration.dial import Allocation, Dial
from dummy.config import DummyForcingConfig
from dummy.equal_cost import EqualCost
from dummy.frame_attention import regions
from dummy.retentions import RetentionTable
from dummy.roles import HeadRoles, Role
from utils.errors import InputError
from wan.attention.head_group import FULL_HISTORY, UNBOUNDED, HeadLayout, Retention
from wan.config import ModelKwargs

MOST_KEPT = 10_000  # frames: 40 minutes, more than any memory holds


@dataclass(frozen=True)
class HeadSplit:
    """How heads part by role.

    Roles are observed in the clean pass of block `ar_start` and hold from the next block on, or are given in `roles`.
    `from_start`: given roles hold from the first block. `equal_cost` decides what neighbour heads keep when it is known
    how many there are.
    """

    by_role: Mapping[Role, Retention]
    ar_start: int
    budget: DummyBudget = field(default_factory=DummyBudget)
    sink_score_frames: int = 1
    query_share: float = 1.0
    roles: HeadRoles | None = None
    from_start: bool = False
    equal_cost: EqualCost | None = None

    def find_roles(self, by_frame: Tensor) -> tuple[HeadRoles, Tensor]:
        """Roles from the attention that heads gave to a block's frames, [layers, heads, context frames + 1] as
        `FrameAttention.by_frame` has it, and its sums [layers, heads, 3] over sink, neighbour and current frames."""
        shares = regions(by_frame, self.sink_score_frames)
        return HeadRoles.from_frame_attention(shares, self.budget, self.lost_by_dummy(by_frame)), shares

    def lost_by_dummy(self, by_frame: Tensor) -> Tensor:
        """[..., context frames + 1] to the attention [...] that goes to frames which dummy heads do not keep."""
        context = by_frame.shape[-1] - 1
        kept = set(self.by_role[Role.DUMMY].keep(range(context)))
        return by_frame[..., [frame for frame in range(context) if frame not in kept]].sum(-1)

    def retentions(self, roles: HeadRoles) -> Mapping[Role, Retention]:
        """What heads of each role keep, given how many there are."""
        return self.by_role if self.equal_cost is None else self.equal_cost.fit(self.by_role, roles.counts())

    def layout(self, roles: HeadRoles) -> HeadLayout:
        """What every head keeps, with heads of a layer that keep equally much together."""
        by_role = self.retentions(roles)
        return RetentionTable.of([[by_role[role] for role in row] for row in roles.table]).layout()


@dataclass(frozen=True)
class ContextPolicy:
    """`initial` is what all heads keep until a split, if there is one, takes over.

    `window_sinks`: sink frames that count as part of the window of `local_attn_size` frames (window and prune).
    `table`: what every head keeps from the first block on; then there is no split. `dial` is what it was chosen by, if
    it was, and `allocation` what that predicts.
    """

    name: str
    initial: Retention
    split: HeadSplit | None = None
    window_sinks: int = 0
    table: RetentionTable | None = None
    dial: Dial | None = None
    allocation: Allocation | None = None

    def fixed_layout(self) -> HeadLayout | None:
        """What every head keeps, where that holds from the first block on."""
        if self.table is not None:
            return self.table.layout()
        if self.split is not None and self.split.from_start and self.split.roles is not None:
            return self.split.layout(self.split.roles)
        return None

    @property
    def bounded(self) -> bool:
        """Whether no head ever keeps more than `MOST_KEPT` frames, however long the video is."""
        kept: list[float] = [self.initial.total]
        if self.split is not None:
            kept += [retention.total for retention in self.split.by_role.values()]
            kept += [] if self.split.equal_cost is None else [self.split.equal_cost.frames]
        return max(kept) <= MOST_KEPT


def base_retention(local_attn_size: int, sink: int, block: int) -> Retention:
    """All earlier frames for a size of -1; else a window of that many frames, sinks and block (`block`) included."""
    return FULL_HISTORY if local_attn_size == -1 else Retention(sink, local_attn_size - sink - block)


def prune_by_role(base: Retention) -> dict[Role, Retention]:
    """Dummy heads see nothing earlier, all others what `base` keeps."""
    return {Role.SINK: base, Role.NEIGHBOR: base, Role.DUMMY: Retention(0, 0)}


def policy_of_table(table: RetentionTable) -> ContextPolicy:
    """Every head keeps what the table says from the first block on."""
    return ContextPolicy("calibrated", table.largest(), table=table)


def calibrated_policy(dial: Dial, frames: float) -> ContextPolicy:
    """Every head keeps what costs least with `frames` earlier frames a head. Raises InputError if that cannot be."""
    allocation = dial.choose(frames)
    return replace(policy_of_table(allocation.table), dial=dial, allocation=allocation)


def frames_asked(dummy: DummyForcingConfig, base: Retention, dial: Dial) -> float:
    """Earlier frames a head that policy calibrated may spend: as many as there are where it asks for more than that
    without giving a number, and as few as can be where the run has yet to measure."""
    least, most = dial.limits()
    if isinstance(dummy.frames_per_head, float):
        return dummy.frames_per_head
    if dummy.speed is not None:
        return least
    return min(max(base.total, least), most) if dummy.frames_per_head == "window" else most


def largest(by_role: Mapping[Role, Retention]) -> Retention:
    """What all heads keep until a packed split: enough for every role."""
    return Retention(max(r.sink for r in by_role.values()), max(r.recent for r in by_role.values()))


def policy_from_config(
    window: ModelKwargs,
    dummy: DummyForcingConfig,
    block: int,
    roles: HeadRoles | None = None,
    dial: Dial | None = None,
) -> ContextPolicy:
    """The policy that the settings ask for, with blocks of `block` latent frames and given or observed roles; policy
    calibrated goes by the `dial`.

    Raises InputError for an equal cost with given roles of which none is a neighbour head's, and for frames a head that
    the dial does not have.
    """
    base = base_retention(window.local_attn_size, window.sink_size, block)
    if not dummy.enabled:
        return ContextPolicy("full" if base == FULL_HISTORY else "window", base, window_sinks=base.sink)
    if dummy.policy == "calibrated":
        assert dial is not None
        return calibrated_policy(dial, frames_asked(dummy, base, dial))
    if dummy.policy == "prune":
        by_role = prune_by_role(base)
    else:
        by_role = {role: Retention(*kept) for role, kept in zip(Role, dummy.retentions(block), strict=True)}
    split = HeadSplit(
        by_role,
        dummy.ar_start,
        dummy.budget,
        dummy.sink_score_frames,
        dummy.score_query_share,
        roles,
        from_start=roles is not None,
    )
    if dummy.policy == "prune":
        return ContextPolicy("prune", base, split, window_sinks=base.sink)
    if dummy.equal_cost is not None and roles is not None and not roles.counts()[Role.NEIGHBOR]:
        raise InputError(
            f"dummy_forcing.equal_cost: {dummy.equal_cost} gives neighbor heads what the others save, but in "
            f"dummy_forcing.roles {dummy.roles} no head is one; give other roles or remove the equal_cost"
        )
    packed = ContextPolicy("packed", largest(by_role), split)
    if dummy.equal_cost == "window":
        return with_equal_cost(packed, base.total, block)
    return with_equal_cost(packed, UNBOUNDED, block) if dummy.equal_cost == "full" else packed


def split_of(dummy: DummyForcingConfig, block: int) -> HeadSplit:
    """How heads part with these settings (prune: over full history); given roles are not looked at."""
    split = policy_from_config(ModelKwargs(), replace(dummy, enabled=True), block).split
    assert split is not None
    return split


def with_equal_cost(packed: ContextPolicy, frames: float, block: int) -> ContextPolicy:
    """The policy with neighbour heads that keep what is left of `frames` earlier frames a head, see `EqualCost`.

    How many that are is known when the roles are; until then all heads keep all that there is by then.
    """
    assert packed.split is not None
    until_split = (packed.split.ar_start + 1) * block
    initial = Retention(packed.initial.sink, max(packed.initial.recent, until_split))
    return replace(packed, initial=initial, split=replace(packed.split, equal_cost=EqualCost(frames)))


def with_frames(policy: ContextPolicy, frames: float, block: int) -> ContextPolicy:
    """The policy with `frames` earlier frames a head, a cost that was measured and not given."""
    if policy.dial is None:
        return with_equal_cost(policy, frames, block)
    least, most = policy.dial.limits()
    return calibrated_policy(policy.dial, min(max(frames, least), most))
