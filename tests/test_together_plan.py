"""What each of several processes takes, and which ways the plan chooses for them: held to what they really hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline.config.config import load_config
from pipeline.planning.plan import planner_for
from pipeline.planning.stages import StagePlanner, VideoStages, no_scores
from pipeline.planning.together import Room, TogetherPlanner
from pipeline.runtime.generator import BlockGenerator
from pipeline.runtime.inputs import GeneratorSettings
from pipeline.runtime.loading import generator_settings
from pipeline.session import Session
from tests.test_generator import SCHEDULE
from tests.test_plan import made
from tests.thread_exchange import ThreadExchange, together
from tests.tiny import CONFIG, random_embeds, tiny_model
from utils.memory import PeakTracker
from utils.seed import ZeroNoise
from wan.attention.exchange import PlannedExchange
from wan.attention.head_group import CacheBytes
from wan.config import ModelConfig
from wan.geometry import LatentGeometry
from wan.transformer.model import CausalWanModel

GEOMETRY = LatentGeometry(8, 12, 12, 3)


def planned(config: ModelConfig, settings: GeneratorSettings, exchange: PlannedExchange | None = None) -> VideoStages:
    with torch.device("meta"):
        model = CausalWanModel(config)
    model.attention, model.exchange = no_scores, exchange
    return StagePlanner(model, GEOMETRY, settings).stages()


def rank_model(config: ModelConfig, exchange: ThreadExchange) -> CausalWanModel:
    model = tiny_model(config)
    model.attention, model.exchange = no_scores, exchange
    return model


def video(model: CausalWanModel, settings: GeneratorSettings) -> list[CacheBytes]:
    """What the cache holds at the beginning and with every block."""
    generator, embeds = BlockGenerator(model, settings), random_embeds(model.config)[0]
    with Session(generator, GEOMETRY, ZeroNoise(1), lambda _: embeds, live=False) as session:
        session.plan([(0, "A prompt.")])
        return [session.rollout.cache.bytes(), *(session.rollout.cache.bytes() for _ in session)]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("full", {}), ("rolling", {"rolling": 12}), ("calibrated", {}), ("EMA", {"window": 9, "relative_rope": True})],
)
def test_the_cache_of_a_rank_is_as_planned(kind: str, settings: dict[str, Any]) -> None:
    """To the byte, and those of all ranks are the whole cache."""
    limits = GeneratorSettings(SCHEDULE, made(kind), **settings)
    held = together(3, lambda exchange: video(rank_model(CONFIG, exchange), limits)[-1])
    assert held == [planned(CONFIG, limits, PlannedExchange(rank, 3)).block.cache for rank in range(3)]
    assert sum(one.total for one in held) == planned(CONFIG, limits).block.cache.total


def test_the_cache_of_a_rank_before_and_after_roles_are_found() -> None:
    """Which heads have which roles is assumed; how many of each, and so the bytes of all ranks, is known."""
    limits = GeneratorSettings(SCHEDULE, made("packed"))
    held = together(2, lambda exchange: video(rank_model(CONFIG, exchange), limits))
    for rank, sizes in enumerate(held):
        before = planned(CONFIG, limits, PlannedExchange(rank, 2)).before_split
        assert before is not None and before.cache == sizes[0]
    own = sum(sizes[-1].own for sizes in held)
    assert own == planned(CONFIG, limits).block.cache.own


def test_passes_of_a_rank_take_what_is_planned() -> None:
    """But for the latents of a block, which count beside a model as narrow as this."""
    wide = replace(CONFIG, dim=384, ffn_dim=768, text_len=64, num_layers=2)
    limits = GeneratorSettings(SCHEDULE, made("full"))

    def peak(exchange: ThreadExchange) -> int:
        model = rank_model(wide, exchange)
        with PeakTracker() as tracker:
            video(model, limits)
        return int(tracker.peak)

    for rank, taken in enumerate(together(2, peak)):
        stages = planned(wide, limits, PlannedExchange(rank, 2))
        assert stages.text + max(stage.total for stage in stages) == pytest.approx(taken, rel=0.1)


def planner(*overrides: str, ranks: int = 3) -> TogetherPlanner:
    config = load_config("configs/shapes_demo.yaml", [f"parallel=heads:{ranks}", *overrides])
    made = planner_for(config, torch.device("cpu"))
    return TogetherPlanner(made, config, generator_settings(config, made.sizes), ranks)


def test_weights_are_sharded_where_they_do_not_fit_as_a_whole() -> None:
    plans = planner()
    wide = plans.fitting(Room(1 << 40, 1 << 40))
    assert not wide.sharded and wide.first.gathered == 0 and wide.first.vae > 0
    assert wide.other.vae == wide.other.vae_cache == wide.other.text_encoder == 0
    assert wide.most is wide.first and wide.first.peak > wide.other.peak
    small = plans.fitting(Room(1 << 10, 1 << 10))
    assert small.sharded and small.first.gathered > 0
    assert wide.first.transformer / 3 < small.first.transformer < wide.first.transformer / 2
    assert (
        "does not fit" not in "".join(plans.about_shards(wide)) and "a shard of every" in plans.about_shards(small)[0]
    )
    whole = planner("precision=fp8").fitting(Room(1 << 10, 1 << 10))
    assert not whole.sharded


def test_tiles_are_dealt_where_that_is_faster() -> None:
    wide = Room(1 << 40, 1 << 40)
    dealt = planner("vae_tile=128", "resolution=[128,384]", "low_memory=false")
    plan = dealt.fitting(wide)
    assert plan.strategy.dealt and not plan.strategy.on_side_stream and plan.part is not None
    assert 1 / 3 < plan.part < 0.6 and f"{100 * plan.part:.0f} %" in dealt.about_tiles(plan)[0]
    assert 0 < plan.other.vae_cache < 0.6 * planner_cache(dealt)
    one = planner("vae_tile=128", "resolution=[128,128]", "low_memory=false")
    assert not next(one.strategies()).dealt  # a single tile
    whole = planner("resolution=[128,384]", "low_memory=false")
    undealt = whole.fitting(wide)
    assert not undealt.strategy.dealt and "with vae_tile=128 all would decode" in whole.about_tiles(undealt)[0]
    elsewhere = planner("vae_tile=128", "resolution=[128,384]", "low_memory=false", "vae_device=cpu")
    assert not next(elsewhere.strategies()).dealt


def planner_cache(plans: TogetherPlanner) -> int:
    """What one process keeps of all tiles."""
    strategy = next(plans.planner.strategies(plans.config))
    return plans.planner.memory(plans.config, plans.settings, strategy).vae_cache
