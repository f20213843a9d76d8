"""What each of several processes that make a video together takes, and the ways of theirs that the plan chooses.

The first process decodes, and encodes prompts; of the others the one that takes most is planned. Parts of the cache
follow from how heads are dealt (wan/attention/exchange.py), those of the activations from a rank's tokens: both are
found by the classes that a run uses, one rank at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product

import torch

from pipeline.config.config import InferenceConfig, geometry_of
from pipeline.planning.memory_plan import MemoryPlan
from pipeline.planning.plan import RESERVE, Planner, planner_for
from pipeline.planning.scale import LINKS, most_loaded
from pipeline.planning.stages import VideoStages
from pipeline.runtime.decoding import DecodeStrategy
from pipeline.runtime.inputs import GeneratorSettings
from pipeline.runtime.loading import choose_vae_device
from utils.memory import memory_of
from wan.attention.exchange import HeadExchange, PlannedExchange
from wan.transformer.sharded import shard_bytes

logger = logging.getLogger(__name__)

SHARED_TILES = (512, 384, 256, 192, 128)  # pixels, of which one suits a number of processes


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
    sharded: bool = False  # the transformer's weights
    part: float | None = None  # of dealt tiles what the most loaded process computes, of what one alone would

    @property
    def most(self) -> MemoryPlan:
        """That of the process which takes most."""
        return max(self.first, self.other, key=lambda plan: plan.peak)

    def lines(self, about: str) -> list[str]:
        return [
            f"Memory, as tensors{about}, of process 0:",
            *self.first.lines(),
            f"Memory, as tensors{about}, of process {self.number}, the most loaded of the others:",
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
        """The first way, from the fastest on, with which all processes have room; or the last. Weights are sharded
        where they fit as a whole in none."""
        *others, last = product(self._sharding(), self.strategies())
        for sharded, strategy in others:
            if room.holds(self._shared(self.planner.undecoded(self.config, strategy, self.first), sharded)):
                plan = self._plan(strategy, sharded)  # which takes long to find out
                if room.holds(plan.first) and room.holds(plan.other):
                    return plan
        return self._plan(last[1], last[0])

    def _sharding(self) -> tuple[bool, ...]:
        """FP8 weights are no parameters, of which shards are made."""
        return (False,) if self.config.precision == "fp8" else (False, True)

    def strategies(self) -> Iterator[DecodeStrategy]:
        """Tiles are dealt to all processes where that is faster than that the first one decodes them all."""
        for strategy in self.planner.strategies(self.config):
            dealt = self.config.vae_device == "auto" and strategy.tile is not None and self.part(strategy.tile) < 1
            yield replace(strategy, dealt=True, on_side_stream=False) if dealt else strategy

    def _shared(self, plan: MemoryPlan, sharded: bool) -> MemoryPlan:
        """Passes of several processes are not captured."""
        less, gathered = shard_bytes(self.planner.model.layers(), self.ranks) if sharded else (0, 0)
        transformer = plan.transformer - less
        return replace(plan, recordings=0, text=plan.stages.text, transformer=transformer, gathered=gathered)

    def part(self, tile: int) -> float:
        """What the most loaded process computes of dealt tiles, of what one process would."""
        height, width = self._pixels()
        (alone,) = self.planner.vae.operations(height, width, tile, 1)
        return max(self.planner.vae.operations(height, width, tile, self.ranks)) / alone

    def _pixels(self) -> tuple[int, int]:
        """Rows and columns that are decoded."""
        geometry, scale = geometry_of(self.config, self.planner.sizes.in_dim), self.planner.vae.spatial_scale
        return geometry.height * scale, geometry.width * scale

    def _plan(self, strategy: DecodeStrategy, sharded: bool) -> TogetherPlan:
        share = (0, self.ranks) if strategy.dealt else None
        first = self.planner.memory(self.config, self.settings, strategy, self.batch, self.first, share)
        part = self.part(strategy.tile) if strategy.dealt and strategy.tile is not None else None
        other = self._shared(self._other(strategy), sharded)
        return TogetherPlan(strategy, self._shared(first, sharded), self.number, other, sharded, part)

    def _other(self, strategy: DecodeStrategy) -> MemoryPlan:
        """Of the most loaded of the others: by its cache, and, where tiles are dealt, by the most of these."""
        if not strategy.dealt or strategy.tile is None:
            plan = self.planner.undecoded(self.config, strategy, self.other)
            return replace(plan, vae=0, text_encoder=0, vae_elsewhere=False)
        work = self.planner.vae.operations(*self._pixels(), strategy.tile, self.ranks)
        share = max(range(1, self.ranks), key=work.__getitem__), self.ranks
        plan = self.planner.memory(self.config, self.settings, strategy, self.batch, self.other, share)
        return replace(plan, text_encoder=0)

    def about_shards(self, plan: TogetherPlan) -> list[str]:
        """What sharding brings and takes, if weights are sharded."""
        if not plan.sharded:
            return []
        less, _ = shard_bytes(self.planner.model.layers(), self.ranks)
        received = less * (len(self.config.denoising_step_list) + 1)  # once a pass
        links = ", ".join(f"{1000 * received / speed:.0f} ms with {name}" for name, speed in LINKS.items())
        return [
            "Weights: they do not fit as a whole, so each process holds a shard of every layer",
            f"  each receives the rest anew for every pass, {received / 1e9:.1f} GB a block, calculated: {links}",
        ]

    def about_tiles(self, plan: TogetherPlan) -> list[str]:
        """What dealing them brings, or could."""
        if plan.part is not None:
            return [f"  the most loaded process computes {100 * plan.part:.0f} % of what one would alone, calculated"]
        if plan.strategy.tile is not None or not self.planner.vae.tiles or self.config.vae_device != "auto":
            return []
        tile = min(SHARED_TILES, key=lambda tile: max(self.planner.vae.operations(*self._pixels(), tile, self.ranks)))
        (alone,) = self.planner.vae.operations(*self._pixels(), max(self._pixels()) // 16 * 16 + 16, 1)
        part = max(self.planner.vae.operations(*self._pixels(), tile, self.ranks)) / alone
        if part >= 1:
            return []
        return [
            f"  by process 0, for which the others wait; with vae_tile={tile} all would decode, the most loaded "
            f"{100 * part:.0f} % of that, calculated"
        ]


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
    if plan.sharded and exchange.rank == 0:
        logger.info("weights: sharded over %d processes, since one has no room for all", exchange.ranks)
    return plan
