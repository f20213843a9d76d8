"""What each of several processes that make a video together takes, and the ways of theirs that the plan chooses.

The first process decodes, and encodes prompts; of the others the one that takes most is planned. Parts of the cache
follow from how heads are dealt (wan/attention/exchange.py), those of the activations from a rank's tokens: both are
found by the classes that a run uses, one rank at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from pipeline.config.config import InferenceConfig, geometry_of
from pipeline.planning.memory_plan import MemoryPlan
from pipeline.planning.plan import RESERVE, Planner, planner_for
from pipeline.planning.scale import most_loaded
from pipeline.planning.stages import VideoStages
from pipeline.runtime.decoding import DecodeStrategy
from pipeline.runtime.inputs import GeneratorSettings
from pipeline.runtime.loading import choose_vae_device
from utils.memory import memory_of
from wan.attention.exchange import HeadExchange, PlannedExchange


@dataclass(frozen=True)
class Room:
    """Bytes that a process may have on its own device, and the first one on that which decodes."""

    own: int
    decoding: int

    @classmethod
    def here(cls, config: InferenceConfig, device: torch.device, ranks: int) -> Room:
        """As each of so many processes finds it; those of a CPU share its memory."""
        place = choose_vae_device(config, device)
        own, decoding = (memory_of(one) // (ranks if one.type == "cpu" else 1) for one in (device, place))
        return cls(own, decoding)

    def holds(self, plan: MemoryPlan) -> bool:
        """Whether the plan leaves a reserve."""
        if plan.vae_elsewhere and plan.vae_peak > self.decoding * (1 - RESERVE):
            return False
        return plan.peak <= self.own * (1 - RESERVE)


@dataclass(frozen=True)
class TogetherPlan:
    """How videos are decoded; what the first process takes, and what process `number`, the most loaded of the others,
    takes."""

    strategy: DecodeStrategy
    first: MemoryPlan
    number: int
    other: MemoryPlan

    @property
    def most(self) -> MemoryPlan:
        """That of the process which takes most."""
        return max(self.first, self.other, key=lambda plan: plan.peak)

    def lines(self, about: str) -> list[str]:
        return [
            f"Memory of process 0, which decodes, as tensors{about}:",
            *self.first.lines(),
            f"Memory of process {self.number}, the most loaded of the others, as tensors{about}:",
            *self.other.lines(),
        ]


@dataclass(frozen=True)
class TogetherPlanner:
    """Plans for `ranks` processes (at least 2) that make `batch` videos at a time."""

    planner: Planner
    config: InferenceConfig
    settings: GeneratorSettings
    ranks: int
    batch: int = 1
    number: int = field(init=False)
    first: VideoStages = field(init=False)
    other: VideoStages = field(init=False)

    def __post_init__(self) -> None:
        geometry = geometry_of(self.config, self.planner.sizes.in_dim)
        number = most_loaded(self.settings.policy, self.planner.sizes, geometry, self.ranks)
        object.__setattr__(self, "number", number)
        object.__setattr__(self, "first", self.stages(0))
        object.__setattr__(self, "other", self.stages(number))

    def stages(self, rank: int) -> VideoStages:
        """What the caches and passes of one process take."""
        return self.planner.stages(self.config, self.settings, self.batch, PlannedExchange(rank, self.ranks))

    def fitting(self, room: Room) -> TogetherPlan:
        """The first way, from the fastest on, with which all processes have room; or the last."""
        *others, last = self._ways()
        for strategy in others:
            if all(map(room.holds, (self._undecoded(strategy), self._other(strategy)))):
                plan = self._plan(strategy)
                if room.holds(plan.first):
                    return plan
        return self._plan(last)

    def _ways(self) -> Iterator[DecodeStrategy]:
        return self.planner.strategies(self.config)

    def _plan(self, strategy: DecodeStrategy) -> TogetherPlan:
        first = self.planner.memory(self.config, self.settings, strategy, self.batch, self.first)
        return TogetherPlan(strategy, _uncaptured(first), self.number, self._other(strategy))

    def _undecoded(self, strategy: DecodeStrategy) -> MemoryPlan:
        """Of the first process, without what the decoder takes when it is at work, which takes long to find out."""
        return _uncaptured(self.planner.undecoded(self.config, strategy, self.first))

    def _other(self, strategy: DecodeStrategy) -> MemoryPlan:
        plan = _uncaptured(self.planner.undecoded(self.config, strategy, self.other))
        return replace(plan, vae=0, text_encoder=0, vae_elsewhere=False)


def _uncaptured(plan: MemoryPlan) -> MemoryPlan:
    """Passes of several processes are not captured."""
    return replace(plan, recordings=0, text=plan.stages.text)


def choose_together(
    config: InferenceConfig, settings: GeneratorSettings, device: torch.device, exchange: HeadExchange, batch: int = 1
) -> TogetherPlan:
    """What the processes of a run do, by the least room that one of them has: as the first one plans it."""
    here = Room.here(config, device, exchange.ranks)
    room = Room(min(exchange.from_all(here.own)), exchange.from_first(here.decoding))
    plan = None
    if exchange.rank == 0:
        plan = TogetherPlanner(planner_for(config, device), config, settings, exchange.ranks, batch).fitting(room)
    plan = exchange.from_first(plan)
    assert plan is not None
    return plan
