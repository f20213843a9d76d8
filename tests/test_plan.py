"""The plan: bytes of a full-size run without its weights, and what a dry run says and does not touch."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dummy.config import DummyForcingConfig
from dummy.policies.calibrated import policy_of_table
from dummy.policies.registry import policy_from_config
from dummy.policy import ContextPolicy
from dummy.retentions import RetentionTable
from dummy.roles import HeadRoles, Role
from pipeline.config.config import InferenceConfig, load_config
from pipeline.planning.cost import assumed_roles
from pipeline.planning.plan import COMPILED, MemoryPlan, Planner
from pipeline.planning.stages import StagePlanner, no_scores
from pipeline.runtime.generator import BlockGenerator
from pipeline.runtime.inputs import GeneratorSettings
from pipeline.runtime.loading import generator_settings
from pipeline.runtime.schedule import DenoisingSchedule
from pipeline.session import Session
from tests.conftest import ROOT, Program
from tests.small_checkpoints import write_safetensors
from tests.test_generator import SCHEDULE, policy
from tests.test_online import online
from tests.tiny import CONFIG, random_embeds, tiny_model
from utils.memory import PeakTracker, memory_of
from utils.seed import ZeroNoise
from wan.attention.head_group import Retention
from wan.config import WAN_1_3B, ModelKwargs
from wan.geometry import LatentGeometry
from wan.transformer.model import CausalWanModel
from wan.vae.vae import VAE

GIB = 1 << 30


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(WAN_1_3B, VAE.published(torch.bfloat16), torch.bfloat16)


def published(*overrides: str) -> InferenceConfig:
    return load_config(ROOT / "configs" / "self_forcing_inference.yaml", overrides)


def memory(planner: Planner, config: InferenceConfig) -> MemoryPlan:
    return planner.memory(config, generator_settings(config, planner.sizes))


def roles_file(folder: Path, dummy: int, neighbor: int, sink: int) -> Path:
    codes = [Role.DUMMY] * dummy + [Role.NEIGHBOR] * neighbor + [Role.SINK] * sink
    table = HeadRoles.from_codes([codes[layer::30] for layer in range(30)])
    path = folder / "roles.json"
    path.write_text(json.dumps(table.to_json()))
    return path


def test_the_cache_of_a_window_at_480p(planner: Planner) -> None:
    plan = memory(planner, published("dummy_forcing=off", "model_kwargs.local_attn_size=12"))
    assert plan.cache.kept / GIB == pytest.approx(2.41, abs=0.005)
    assert plan.cache.own / GIB == pytest.approx(0.80, abs=0.005)
    assert plan.cache.total <= 1.05 * (plan.cache.kept + plan.cache.own)
    assert plan.cache_before_split is None


def test_the_packed_cache_at_480p(planner: Planner, tmp_path: Path) -> None:
    plan = memory(planner, published(f"dummy_forcing.roles={roles_file(tmp_path, 180, 120, 60)}"))
    assert plan.cache.kept / GIB == pytest.approx(0.45, abs=0.005)
    assert plan.cache.own / GIB == pytest.approx(0.80, abs=0.005)
    assert plan.cache.total <= 1.05 * (plan.cache.kept + plan.cache.own)
    assert plan.cache_before_split is None  # known roles hold from the first block on


def test_roles_that_are_to_be_found_need_room_for_every_head_until_then(planner: Planner) -> None:
    plan = memory(planner, published())
    assert plan.cache_before_split is not None
    assert plan.cache_before_split.kept / GIB == pytest.approx(2.41 * 3 / 9, abs=0.005)  # the block before
    assert plan.cache_before_split.total > plan.cache.total
    assert plan.peak > plan.transformer + plan.vae + plan.cache_before_split.total


def test_weights_and_text_at_full_size(planner: Planner) -> None:
    plan = memory(planner, published())
    assert plan.transformer == 2 * 1_418_996_800  # bytes of bf16; the parameters of the published file
    assert plan.vae == 2 * 126_892_531
    text = 2 * 30 * 512 * 1536 * 2  # k and v, layers, tokens, width, bytes
    assert plan.text == 2 * text  # once more for the recordings
    assert memory(planner, published("engine=eager")).text == text
    switched = memory(planner, story("model_kwargs.local_attn_size=12"))  # several prompts, of which two are there
    assert switched.text == text and switched.stages.prompt is not None
    assert switched.stages.prompt.activations >= text + switched.transformer_activations


def test_an_attention_window_costs_what_it_holds_and_larger_videos_cost_more(planner: Planner) -> None:
    off = "dummy_forcing=off"
    full = memory(planner, published(off, "model_kwargs.local_attn_size=-1", "num_output_frames=120"))
    window = memory(planner, published(off, "num_output_frames=120"))
    assert full.cache.kept == 13 * window.cache.kept  # 117 earlier frames and 9
    large = memory(planner, published(off, "resolution=1080"))
    tokens = (136 * 240) / (60 * 104)
    assert large.cache.kept == pytest.approx(tokens * window.cache.kept)
    assert large.vae_activations > 4 * window.vae_activations
    assert large.transformer_activations > 4 * window.transformer_activations


@pytest.mark.parametrize("num_dummy", [0, 1, 7, 180, 359, 360])
def test_assumed_roles_have_the_asked_number_of_dummy_heads(num_dummy: int) -> None:
    split = generator_settings(published(f"dummy_forcing.num_dummy={num_dummy}"), WAN_1_3B).policy.split
    assert split is not None
    counts = assumed_roles(WAN_1_3B, split).counts()
    assert counts[Role.DUMMY] == num_dummy
    assert abs(counts[Role.SINK] - counts[Role.NEIGHBOR]) <= 1


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def test_a_dry_run_says_what_a_run_would_do(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert program("--dry_run", "num_samples=2", "num_output_frames=15") == 0
    out = said(capsys)
    for part in (
        "48x32, 57 frames at 16 fps",
        "15 frames of 4x6 in 5 blocks of 3; 6 tokens a frame",
        "3 layers x 4 heads",
        "Policy: packed",
        "first 1 + last 3 = 4 frames",  # all heads, until the roles are known
        "first 1 + last 0 = 1 frames",  # sink
        "first 0 + last 3 = 3 frames",  # neighbor
        "first 0 + last 1 = 1 frames",  # dummy
        "6 heads",
        "transformer weights",
        "VAE weights",
        "cache, kept frames",
        "transformer activations",
        "VAE activations",
        "text encoder",
        "peak",
        "'A red fox runs.'",
        str(program.videos / "002-a-green-fish-swims-1.mp4"),
    ):
        assert part in out, part
    assert out.count("  ok      ") == 5 and "MISSING" not in out
    assert not program.videos.exists()


def test_a_dry_run_of_a_window(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert program("--dry_run", "dummy_forcing=off", "num_output_frames=15") == 0
    out = said(capsys)
    assert "Policy: window" in out and "first 3 + last 6 = 9 frames" in out


def test_a_dry_run_does_not_read_the_text_encoder(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    root = program.folder / "checkpoints"
    shutil.copytree(program.model_root, root)
    encoder = root / "Wan2.1-T2V-1.3B" / "models_t5_umt5-xxl-enc-bf16.pth"
    state = torch.load(encoder, weights_only=True)
    rows = (400 << 30) // (2 * state["token_embedding.weight"].shape[1])
    shapes = {name: list(tensor.shape) for name, tensor in state.items() if name != "token_embedding.weight"}
    shapes["token_embedding.weight"] = [rows, state["token_embedding.weight"].shape[1]]
    write_safetensors(encoder, {name: ("BF16", shape) for name, shape in shapes.items()})  # whatever its name
    begun = time.monotonic()
    assert program("--dry_run", f"model_root={root}", "precision=bf16") == 0
    assert time.monotonic() - begun < 30
    assert "400.00 GiB" in said(capsys)


def test_a_dry_run_shows_missing_files(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = program.folder / "nowhere"
    assert program("--dry_run", f"model_root={nowhere}") == 2
    captured = capsys.readouterr()
    assert captured.out.count("MISSING") == 5
    assert "30 layers x 12 heads" in captured.out  # what the folder's name promises
    assert captured.err.startswith("error: ") and f"bash hfd.sh gdhe17/Self-Forcing {nowhere}" in captured.err


def test_a_dry_run_finds_weights_that_do_not_fit(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    other = program.file("other.pt", b"")
    torch.save({"generator_ema": {"patch_embedding.weight": torch.zeros(2)}}, other)
    assert program("--dry_run", f"generator_ckpt={other}") == 2
    assert f"{other} does not fit" in capsys.readouterr().err


def story(*overrides: str) -> InferenceConfig:
    return load_config(ROOT / "configs" / "longlive_interactive_inference.yaml", ["engine=eager", *overrides])


@pytest.mark.parametrize(("resolution", "more"), [(480, 0.72), (720, 1.66), (1080, 3.76)])
def test_a_prompt_switch_encodes_many_frames_at_once(planner: Planner, resolution: int, more: float) -> None:
    """Nine earlier frames beside the three of a block."""
    config = story(f"resolution={resolution}", "model_kwargs.local_attn_size=12", "dummy_forcing=off")
    plan = memory(planner, config)
    assert plan.stages.switch is not None
    grown = plan.stages.switch.activations - plan.transformer_activations
    assert grown / GIB == pytest.approx(more, rel=0.1)
    assert plan.peak >= plan.transformer + plan.text + plan.cache.total + plan.stages.switch.activations
    assert any("where a prompt switch encodes anew" in line for line in plan.lines())


def test_several_videos_at_a_time_take_several_times_as_much(planner: Planner) -> None:
    config = published("engine=eager")
    settings = generator_settings(config, planner.sizes)
    one, three = (planner.memory(config, settings, batch=batch) for batch in (1, 3))
    assert three.transformer == one.transformer and three.vae == one.vae
    assert three.text == 3 * one.text and three.cache.total == 3 * one.cache.total
    for name in ("transformer_activations", "vae_cache", "vae_activations"):
        assert getattr(three, name) == pytest.approx(3 * getattr(one, name), rel=0.02)
    assert planner.strategy(config, settings, 24 * GIB, 1) != planner.strategy(config, settings, 24 * GIB, 8)


def test_captured_passes_have_memory_of_their_own(planner: Planner) -> None:
    """What runs as it is, a video's first block in the decoder for one, cannot use it."""
    captured, eager = (memory(planner, published(f"engine={engine}")) for engine in ("auto", "eager"))
    assert captured.recordings == captured.transformer_activations
    assert captured.vae_recordings == int(COMPILED * eager.vae_activations)
    assert captured.vae_activations == eager.vae_activations > 0
    own = captured.recordings + captured.vae_recordings
    assert captured.peak - captured.text == eager.peak - eager.text + own
    framewise = memory(planner, published("engine=auto", "num_frame_per_block=1"))
    assert framewise.vae_activations < framewise.vae_recordings / COMPILED  # one frame of pixels


def test_the_memory_of_a_gpu_is_what_this_process_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 * GIB)
    assert memory_of(torch.device("cuda", 0)) == 25 * GIB


def made(kind: str) -> ContextPolicy:
    if kind == "calibrated":  # heads of three lengths in every layer, one of which sees nothing earlier
        kept = [Retention(0, 0), Retention(1, 2), Retention(3, 6), Retention(0, 3)]
        return policy_of_table(RetentionTable.of([kept, kept[::-1], kept]))
    if kind == "online":
        return online(block=3)
    if kind == "rolling":
        return policy("full").at_most(3, 15)
    if kind == "EMA":
        return policy_from_config(ModelKwargs(9, sink_size=3, ema_sink_alpha=0.9), DummyForcingConfig(False), 3)
    return policy(kind)


@pytest.mark.parametrize(
    ("kind", "starts", "settings"),
    [
        ("full", (0,), {"batch": 2}),
        ("full", (0, 9), {}),
        ("window", (0,), {}),
        ("window", (0, 12), {"window": 9}),
        ("window", (0, 12), {"window": 9, "global_sink": True}),
        ("window", (0, 12), {"window": 9, "global_sink": True, "relative_rope": True}),
        ("window", (0, 12), {"window": 9, "kv_flush": True}),
        ("rolling", (0,), {"rolling": 18}),
        ("EMA", (0,), {"window": 9, "relative_rope": True}),
        ("EMA", (0, 12), {"window": 9, "relative_rope": True, "kv_flush": True}),
        ("packed", (0,), {}),
        ("packed", (0, 3), {"window": 12}),
        ("packed", (0, 12), {"window": 12, "batch": 2}),
        ("packed", (0, 6, 12), {"window": 12, "reclassify_on_switch": True}),
        ("prune", (0,), {}),
        ("prune", (0, 18), {"window": 12, "reclassify_on_switch": True}),
        ("calibrated", (0,), {}),
        ("calibrated", (0, 12), {"window": 12, "batch": 2}),
        ("online", (0,), {}),
        ("online", (0, 12), {"window": 12, "reclassify_on_switch": True}),
    ],
)
def test_stages_are_what_a_video_takes(kind: str, starts: tuple[int, ...], settings: dict[str, Any]) -> None:
    """But for the latents of a block, which count beside a model as narrow as this."""
    batch, settings = settings.get("batch", 1), {key: value for key, value in settings.items() if key != "batch"}
    geometry, wide = LatentGeometry(8, 12, 24, 3), replace(CONFIG, dim=384, ffn_dim=768, text_len=64)
    model = tiny_model(wide)
    model.attention = no_scores  # what a CPU's attention allocates is its own business
    # Further steps of a block are like its first, but where blocks are denoised together: one a step.
    schedule = SCHEDULE if kind == "rolling" else DenoisingSchedule.build([1000, 500], 5.0, warp=True)
    generator = BlockGenerator(model, GeneratorSettings(schedule, made(kind), **settings))
    with torch.device("meta"):
        planned = CausalWanModel(wide)
    planned.attention = no_scores
    stages = StagePlanner(planned, geometry, generator.settings, batch).stages(starts)
    embeds = random_embeds(wide)[0]
    with PeakTracker() as tracker:
        session = Session(generator, geometry, ZeroNoise(batch), lambda _: embeds, batch=batch, live=False)
        session.plan([(start, f"Prompt {start}.") for start in starts])
        with session:
            assert sum(1 for _ in session) == geometry.num_blocks
    assert stages.text + max(stage.total for stage in stages) == pytest.approx(tracker.peak, rel=0.05)
