"""Context policies: what every head keeps, before and after the roles of the heads are known.

Full history, a window with sinks, and every method of dummy/policies/ are retentions here and nothing else; neither the
cache nor attention has a branch for them. A method is a `CachePolicy`; this file knows none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, replace
from typing import Any, ClassVar, Protocol

from torch import Tensor

from dummy.budget import DummyBudget
from dummy.calibration.dial import Allocation, Dial
from dummy.calibration.online import OnlineCalibration
from dummy.config import DummyForcingConfig
from dummy.equal_cost import EqualCost
from dummy.frame_attention import FrameAttention, regions
from dummy.observed import Observed, Outcome
from dummy.retentions import RetentionTable
from dummy.roles import HeadRoles, Role
from wan.attention.ema_sink import EmaSinks
from wan.attention.head_group import FULL_HISTORY, UNBOUNDED, HeadLayout, Observer, Retention, RetentionRule
from wan.attention.rolling_sink import RollingSinks
from wan.config import ModelConfig, ModelKwargs

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
    in_clean_pass: ClassVar[bool] = True

    def observer(
        self, tokens_per_frame: int, videos: int | None, grams: Callable[[], Sequence[Tensor]]
    ) -> FrameAttention:
        return FrameAttention(tokens_per_frame, self.query_share, videos=videos)

    def outcome(self, seen: Observer, all_heads: Callable[[Tensor], Tensor]) -> Outcome:
        assert isinstance(seen, FrameAttention)
        roles, shares = self.find_roles(all_heads(seen.by_frame()))
        return Outcome(self.layout(roles), roles, shares)

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
    it was, and `allocation` what that predicts. `online`: heads part by the errors that the video shows, without roles.
    """

    name: str
    initial: Retention
    split: HeadSplit | None = None
    window_sinks: int = 0
    table: RetentionTable | None = None
    dial: Dial | None = None
    allocation: Allocation | None = None
    at_frames: Callable[[float], ContextPolicy] | None = None
    online: OnlineCalibration | None = None

    @property
    def observed(self) -> Observed | None:
        """What parts the heads by what the video shows, if that is so."""
        return self.split or self.online

    def fixed_layout(self) -> HeadLayout | None:
        """What every head keeps, where that holds from the first block on."""
        if self.table is not None:
            return self.table.layout()
        if self.split is not None and self.split.from_start and self.split.roles is not None:
            return self.split.layout(self.split.roles)
        return None

    def beginning(self, frames: int) -> Retention:
        """What all heads keep until they part, where that is once there are `frames` latent frames."""
        if self.online is None:
            return self.initial
        return self.online.beginning(frames)

    def at_most(self, sink: int, recent: int) -> ContextPolicy:
        """The policy with heads that keep no more than so many of the first and of the last frames each; full history
        becomes just that."""
        assert self.online is None and (self.split is None or self.split.from_start)

        def less(kept: Retention) -> Retention:
            first = sink if kept.recent >= UNBOUNDED else min(kept.sink, sink)
            return Retention(first, min(kept.recent, recent))

        table, split = self.table, self.split
        if table is not None:
            table = RetentionTable.of([[less(kept) for kept in row] for row in table.rows])
        if split is not None:
            split = replace(split, by_role={role: less(kept) for role, kept in split.by_role.items()})
        return replace(self, initial=less(self.initial), table=table, split=split)

    @property
    def bounded(self) -> bool:
        """Whether no head ever keeps more than `MOST_KEPT` frames, however long the video is."""
        kept: list[float] = [self.initial.total]
        if self.split is not None:
            kept += [retention.total for retention in self.split.by_role.values()]
            kept += [] if self.split.equal_cost is None else [self.split.equal_cost.frames]
        if self.online is not None:
            kept.append(self.online.longest())
        return max(kept) <= MOST_KEPT


@dataclass(frozen=True)
class PolicyRequest:
    """What is known when a policy is made, all of it on the host.

    `block`: latent frames a block (n). `base`: what all heads keep without the section `dummy_forcing`. `roles` and
    `dial` are those of the files `dummy_forcing.roles` and `.calibration`, where they are set. `model` has the numbers
    of layers and heads.
    """

    settings: DummyForcingConfig
    block: int
    base: Retention
    roles: HeadRoles | None = None
    dial: Dial | None = None
    model: ModelConfig | None = None


class CachePolicy(Protocol):
    """A head-wise method: how it is decided what every head keeps. dummy/policies/registry.py lists them.

    An implementation is a frozen dataclass; its fields are the keys of `dummy_forcing.options`, with their types and
    defaults. `uses`: the keys of `dummy_forcing` among `registry.SELECTIVE` that it goes by; others are refused.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    uses: ClassVar[frozenset[str]]

    def check(self, settings: DummyForcingConfig) -> None:
        """Raises InputError for settings of which nothing can be made, whatever the model."""

    def build(self, request: PolicyRequest) -> ContextPolicy:
        """What heads keep. Raises InputError where the request cannot be met."""


def base_retention(window: ModelKwargs, block: int) -> Retention:
    """All earlier frames for a `local_attn_size` of -1; else what a window of that many frames has besides the block of
    `block` frames at work: the first `sink_size` and the last ones, by the rule that the section names, if it does."""
    rule: RetentionRule | None = RollingSinks() if window.rolling_sink else None
    if window.ema_sink_alpha is not None:
        rule = EmaSinks(window.ema_sink_alpha)
    if window.local_attn_size == -1:
        return replace(FULL_HISTORY, rule=rule)
    return Retention(window.sink_size, window.local_attn_size - window.sink_size - block, rule)
