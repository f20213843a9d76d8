"""What each of several processes takes, and which ways the plan chooses for them: held to what they really hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline.planning.stages import StagePlanner, VideoStages, no_scores
from pipeline.runtime.generator import BlockGenerator
from pipeline.runtime.inputs import GeneratorSettings
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
