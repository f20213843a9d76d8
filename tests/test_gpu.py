"""What only a GPU can show: real recordings, their numbers, and that nothing in the loop waits for the device."""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.vae import random_vae
from dummy.roles import HeadRoles
from pipeline.config.config import InferenceConfig, geometry_of
from pipeline.planning.plan import RESERVE, Planner
from pipeline.runtime.decoding import BlockDecoder, DecodeStrategy, fastest_strategy, start_decoder
from pipeline.runtime.engine import choose_engine, passes_of, start_engine
from pipeline.runtime.generator import BlockGenerator
from tests.test_generator import GEOMETRY, ROLES, generator, latents, start
from tests.tiny import CONFIG, tiny_model
from utils.profiler import Profiler
from wan.transformer.graphs import GraphedPasses
from wan.transformer.layers import FeedForward, gelu_product, has_gelu_product
from wan.transformer.model import CausalWanModel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

WIDE = replace(CONFIG, dim=256, ffn_dim=512)  # heads of 64, which fused attention kernels take


def on_gpu(dtype: torch.dtype) -> CausalWanModel:
    return tiny_model(WIDE).to("cuda", dtype)


def videos(made: BlockGenerator, *seeds: int) -> list[Tensor]:
    return [latents(start(made, seed)) for seed in seeds]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "roles"), [("full", None), ("window", None), ("prune", ROLES), ("packed", ROLES), ("packed", None)]
)
def test_recordings_give_the_same_videos(kind: str, roles: HeadRoles | None, dtype: torch.dtype) -> None:
    """The same kernels on the same numbers, for a second video with other noise too; kernels may be chosen by how
    their inputs are aligned, and then round otherwise."""
    eager = generator(on_gpu(dtype), kind, roles)
    recorded = BlockGenerator(eager.model, eager.settings, passes_of(eager.model, "recorded"))
    for one, other in zip(videos(eager, 1, 2), videos(recorded, 1, 2), strict=True):
        assert (one - other).norm() / one.norm() < (1e-4 if dtype is torch.float32 else 0.01)


def test_auto_is_graphed_and_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Everything is compiled and recorded at the start: the first video adds nothing."""
    pytest.importorskip("triton")
    made = generator(on_gpu(torch.bfloat16), "packed", ROLES)
    with caplog.at_level(logging.WARNING):
        start_engine(made, "auto", GEOMETRY)
    assert choose_engine("auto", torch.device("cuda")) == "graphed"
    assert not caplog.records
    passes = made.passes
    assert isinstance(passes, GraphedPasses)
    captures = passes.captures
    (video,) = videos(made, 1)
    assert passes.captures == captures > 0
    (expected,) = videos(generator(on_gpu(torch.bfloat16), "packed", ROLES), 1)
    assert (video - expected).norm() / expected.norm() < 0.02


@torch.inference_mode()
def test_gelu_within_the_product_is_the_gelu_after_it() -> None:
    forward = FeedForward(WIDE).to("cuda", torch.bfloat16)
    x = torch.randn(2, 50, WIDE.dim, device="cuda", dtype=torch.bfloat16)
    assert has_gelu_product(x) and not has_gelu_product(x.float())
    expected = forward[1](torch.nn.functional.linear(x.float(), forward[0].weight.float(), forward[0].bias.float()))
    torch.testing.assert_close(gelu_product(forward[0], x).float(), expected, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(forward(x), forward[2](expected.bfloat16()), atol=1e-2, rtol=2e-2)


def test_the_loop_never_waits_for_the_device() -> None:
    made = generator(on_gpu(torch.bfloat16), "packed", ROLES)
    made.passes = passes_of(made.model, "recorded")
    videos(made, 1)
    rollout = start(made, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the mode says that it is a prototype
            for _ in rollout.blocks():
                pass
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tile", [None, 64])
def test_what_is_kept_on_the_host_changes_no_bit_and_leaves_the_device(tile: int | None) -> None:
    vae = random_vae(16, torch.device("cuda"), torch.bfloat16)
    blocks = torch.randn(2, 9, 16, 32, 32, generator=torch.Generator().manual_seed(0)).split(3, dim=1)
    made, peaks, kept = [], [], 0
    for on_host in (False, True):
        vae.forget()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        decoder = vae.decoder(1, tile, on_host=on_host)
        made.append(torch.cat([decoder.decode(block).cpu() for block in blocks], dim=1))
        peaks.append(torch.cuda.max_memory_allocated())
        kept = decoder.cache_bytes()
        decoder.close()
    assert torch.equal(*made)
    assert peaks[1] < peaks[0] - kept // 2


def test_recordings_share_their_memory() -> None:
    """Four times as many recordings do not take four times as much."""
    sizes = []
    for frames in (6, 24):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        made = generator(on_gpu(torch.bfloat16), "full")
        made.passes = passes_of(made.model, "recorded")
        latents(start(made, 1, geometry=replace(GEOMETRY, num_frames=frames)))
        sizes.append(torch.cuda.memory_reserved() - before)
        del made
    assert sizes[1] < 2 * sizes[0] + (64 << 20)


def test_waiting_for_frames_leaves_the_core_to_others() -> None:
    device = torch.device("cuda")
    decoder = BlockDecoder(random_vae(8, device, torch.float32), (32, 48), Profiler(device), DecodeStrategy())
    busy = torch.rand(4096, 4096, device=device)
    torch.cuda.synchronize(device)
    for _ in range(200):
        busy = torch.tanh(busy @ busy)
    frames = decoder._to_host((busy[:32, :48] * 255).to(torch.uint8))
    before, worked = time.perf_counter(), time.thread_time()
    frames.wait()
    waited = time.perf_counter() - before
    assert waited < 0.05 or time.thread_time() - worked < 0.5 * waited


def test_the_allocator_holds_no_more_than_the_plan_and_its_reserve() -> None:
    """With everything captured; the plan counts tensors, the allocator keeps pieces of 2 and 20 MiB beside them. What
    getting ready takes for a moment is not in the plan."""
    config = InferenceConfig(resolution=(256, 384), num_output_frames=12, num_frame_per_block=3, engine="graphed")
    geometry = geometry_of(config, CONFIG.in_dim)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    made = generator(on_gpu(torch.bfloat16), "packed")
    vae = random_vae(32, torch.device("cuda"), torch.bfloat16)
    start_engine(made, "graphed", geometry)
    start_decoder(vae, "graphed", True, torch.zeros(1, *geometry.block_shape, device="cuda"))
    strategy = fastest_strategy(vae.device, 3, overlap=True)
    decoder = BlockDecoder(vae, config.pixel_size, Profiler(vae.device), strategy)
    for block in start(made, 1, geometry=geometry).blocks():
        decoder.decode(block.latents).wait()
    held = torch.cuda.memory_reserved() - before
    planned = random_vae(32, torch.device("cpu"), torch.bfloat16).to("meta").lay_out_for(vae.device)
    plan = Planner(WIDE, planned, torch.bfloat16).memory(config, made.settings, strategy)
    assert plan.peak * 0.5 < held < plan.peak * (1 + RESERVE) + (128 << 20)
