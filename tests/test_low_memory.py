"""Ways that take less memory, in order; and a plan that says what a run really takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.assembly import Pipeline
from pipeline.config.config import InferenceConfig, load_config
from pipeline.config.jobs import VideoJob, read_jobs
from pipeline.planning.plan import RESERVE, Planner, planner_for
from pipeline.runtime.decoding import DecodeStrategy
from pipeline.runtime.loading import generator_settings, text_encoder_place
from pipeline.video_files import write_videos
from tests.conftest import ROOT, Program
from utils.memory import PeakTracker
from utils.video import probe
from wan.config import WAN_1_3B
from wan.vae.vae import VAE

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FAST, SMALL = DecodeStrategy(3, on_side_stream=True), DecodeStrategy(1, frame_chunk=1)
GIB = 2**30


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(WAN_1_3B, VAE.published(torch.bfloat16), torch.bfloat16)


def published(*overrides: str) -> InferenceConfig:
    return load_config(ROOT / "configs" / "self_forcing_inference.yaml", overrides)


@pytest.mark.parametrize(
    ("overrides", "first", "tiles"),
    [
        ((), [FAST, SMALL], True),
        (("low_memory=true",), [SMALL], True),
        (("low_memory=false",), [FAST], True),
        (("overlap=false",), [DecodeStrategy(3), SMALL], True),
        (("vae_tile=never",), [FAST, SMALL], False),
        (
            ("vae_tile=256",),
            [DecodeStrategy(3, 256, on_side_stream=True), DecodeStrategy(1, 256, frame_chunk=1)],
            False,
        ),
    ],
)
def test_ways_from_the_fastest_to_the_smallest(
    planner: Planner, overrides: tuple[str, ...], first: list[DecodeStrategy], tiles: bool
) -> None:
    strategies = list(planner.strategies(published(*overrides)))
    assert strategies[: len(first)] == first
    rest = strategies[len(first) :]
    plain, on_host = (
        [strategy for strategy in rest if not strategy.on_host],
        [strategy for strategy in rest if strategy.on_host],
    )
    assert rest == [*plain, *on_host]
    assert [strategy.tile for strategy in plain] == ([960, 640, 512, 384] if tiles else [])
    assert bool(on_host) == ("low_memory=false" not in overrides)
    for strategy in on_host:
        assert strategy.tile in ([plain_way.tile for plain_way in plain] or [first[0].tile])


def test_on_a_cpu_the_host_has_no_other_memory() -> None:
    planner = Planner(WAN_1_3B, VAE.published(torch.bfloat16), torch.bfloat16, vae_device=CPU)
    assert not any(strategy.on_host for strategy in planner.strategies(published("low_memory=true", "device=cpu")))


def test_1080p_within_16_gb_with_the_caches_on_the_host(planner: Planner) -> None:
    config = published("resolution=1080")
    settings = generator_settings(config, planner.sizes)
    strategy = DecodeStrategy(1, 384, frame_chunk=2, on_host=True)  # the last that is tried
    on_host, plain = (planner.memory(config, settings, one) for one in (strategy, replace(strategy, on_host=False)))
    assert on_host.vae_cache == plain.vae_cache_on_host == 0
    assert on_host.vae_cache_on_host == plain.vae_cache > 10 * GIB
    assert on_host.peak < 16 * GIB * (1 - RESERVE)
    assert plain.peak > 24 * GIB * (1 - RESERVE)
    assert any("VAE cache, in the memory of the host" in line for line in on_host.lines())


def test_less_memory_when_there_is_less(planner: Planner) -> None:
    config = published("resolution=1080")
    settings = generator_settings(config, planner.sizes)
    peaks = [planner.memory(config, settings, strategy).peak for strategy in (FAST, SMALL)]
    assert peaks[1] < 0.8 * peaks[0]
    assert planner.strategy(config, settings, 80 * GIB) == FAST
    assert planner.strategy(config, settings, int(peaks[1] / 0.9) + 1) == SMALL
    assert planner.strategy(config, settings, GIB) == DecodeStrategy(
        1, 384, frame_chunk=2, on_host=True
    )  # nothing fits: the least


def test_what_works_at_the_same_time_is_there_at_the_same_time(planner: Planner) -> None:
    config = published()
    settings = generator_settings(config, planner.sizes)
    stages = planner.stages(config, settings)
    on_side_stream, after = (
        planner.memory(config, settings, DecodeStrategy(3, on_side_stream=both), stages=stages)
        for both in (True, False)
    )
    observed = stages.before_split  # the block that takes most, with room for every head
    assert observed is not None
    less = min(observed.activations, on_side_stream.vae_activations)
    assert on_side_stream.peak - after.peak == less > 0


def test_another_device_for_the_vae_is_counted_apart(planner: Planner) -> None:
    together, apart = (
        planner.memory(config, generator_settings(config, planner.sizes))
        for config in (published(), published("vae_device=cuda:1"))
    )
    assert apart.peak == together.peak - together.vae_peak
    assert any("peak on the device of the VAE" in line for line in apart.lines())


def test_the_text_encoder_stays_on_the_cpu() -> None:
    assert text_encoder_place(published("low_memory=true"), GPU) == CPU
    assert text_encoder_place(published("low_memory=true", "text_encoder_device=device"), GPU) == GPU


@pytest.mark.parametrize("overrides", [(), ("low_memory=true",), ("vae_tile=128",)])
def test_a_plan_says_what_a_run_takes(program: Program, overrides: tuple[str, ...]) -> None:
    """Within a tenth, as bytes of tensors, with everything from the first block to the written file."""
    arguments = program.arguments("resolution=[144,192]", "num_output_frames=9", *overrides)
    program.videos.mkdir()
    job = check_the_plan(load_config(arguments[1], arguments[2:]))
    assert probe(Path(job.path)).frames == 33


def check_the_plan(config: InferenceConfig) -> VideoJob:
    """Makes the first video of a configuration, and compares what that took with its plan."""
    job = read_jobs(config)[0]
    pipeline = Pipeline.from_config(config, prompts=job.prompts, device=CPU)
    planner = planner_for(config, CPU)
    plan = planner.memory(config, generator_settings(config, planner.sizes), pipeline.strategy)
    with PeakTracker() as tracker:
        write_videos(pipeline, [job], lambda _: None)
    assert plan.peak == pytest.approx(tracker.peak + plan.transformer + plan.vae, rel=0.1)
    return job
