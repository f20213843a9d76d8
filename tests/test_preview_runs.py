"""Runs with `decoder: taehv:FILE`, on the small checkpoints: that they say so, what they need, and what they make."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import interactive_inference
from benchmarks import vae as benchmark
from pipeline.assembly import Pipeline, assemble
from pipeline.config.config import InferenceConfig, as_dict, load_config
from pipeline.config.jobs import read_jobs
from pipeline.planning.plan import Planner, planner_for
from pipeline.runtime.loading import generator_settings, require_files
from tests.conftest import ROOT, Program
from tests.small_checkpoints import SmallCheckpoints
from tests.test_inference import SMALL
from tests.test_low_memory import check_the_plan
from tests.test_preview import preview_weights, whole
from utils.errors import InputError
from utils.video import VideoWriter, probe, to_uint8
from wan.config import WAN_1_3B
from wan.vae.preview import PreviewDecoder
from wan.vae.vae import VAE

CPU = torch.device("cpu")
NAME = "000-a-red-fox-runs-0"


@pytest.fixture
def preview(tmp_path: Path) -> Path:
    path = tmp_path / "taew2_1.safetensors"
    save_file(preview_weights(), path)
    return path


def without_vae(program: Program) -> Path:
    root = program.folder / "without_vae"
    shutil.copytree(program.model_root, root)
    (root / "Wan2.1-T2V-1.3B" / "Wan2.1_VAE.pth").unlink()
    return root


def test_a_run_makes_a_video_says_what_decodes_and_records_it(
    program: Program, preview: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """The VAE is not needed; ways that take less memory give the same bytes."""
    decoder = f"decoder=taehv:{preview}"
    assert program("inference_iter=1", decoder, f"model_root={without_vae(program)}") == 0
    video = program.videos / f"{NAME}.mp4"
    assert probe(video) == SMALL
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith(f"decoder: {preview} is for previews: these videos are of less quality")
    assert "python -m benchmarks.vae --preview FILE" in warning
    made = json.loads(video.with_suffix(".json").read_text())
    assert made["config"]["decoder"] == f"taehv:{preview}"
    before = program.mp4s
    assert program("inference_iter=1", decoder, "low_memory=true", "overlap=false", "overwrite=true") == 0
    assert program.mp4s == before
    capsys.readouterr()
    assert program("inference_iter=1") == 0
    assert "although it was made with other decoder; overwrite=true" in capsys.readouterr().out
    assert program("inference_iter=1", "overwrite=true") == 0
    assert program.mp4s != before


def configure(program: Program, *overrides: str) -> InferenceConfig:
    arguments = program.arguments(*overrides)
    program.videos.mkdir(exist_ok=True)
    return load_config(arguments[1], arguments[2:])


def test_frames_are_what_the_file_makes_of_the_latents(program: Program, preview: Path) -> None:
    config = configure(program, f"decoder=taehv:{preview}")
    job = read_jobs(config)[0]
    pipeline = Pipeline.from_config(config, prompts=job.prompts, device=CPU)
    with pipeline.session(frames=config.num_output_frames) as session:
        session.prompt(job.prompts[0])
        latents, frames = zip(*((block.latents, block.frames) for block in session), strict=True)
    expected = to_uint8(whole(preview_weights(), torch.cat(latents, dim=1))[0])
    video = torch.cat(frames)
    assert video.shape == (33, 32, 48, 3)
    assert (video.int() - expected.int()).abs().max() <= 1


def test_a_video_starts_from_a_file_with_the_vaes_encoder(
    program: Program, preview: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = program.folder / "given.mp4"
    with VideoWriter(given, 48, 32) as writer:
        writer.write(np.random.default_rng(0).integers(0, 255, (9, 32, 48, 3), np.uint8))
    overrides = ("inference_iter=1", f"decoder=taehv:{preview}", f"start_from={given}", "dummy_forcing=off")
    assert program(*overrides) == 0
    made = json.loads((program.videos / f"{NAME}.json").read_text())
    assert made["timings"]["prefix_blocks"] == 1 and probe(program.videos / f"{NAME}.mp4") == SMALL
    config = configure(program, *overrides)
    planner = planner_for(config, CPU)
    small = sum(tensor.nbytes for tensor in preview_weights().values() if tensor.shape[0] != 64)
    plan = planner.memory(config, generator_settings(config, planner.sizes))
    assert plan.vae == small + planner.encoder_bytes > small
    assert program(*overrides, "overwrite=true", f"model_root={without_vae(program)}") == 2
    assert "Wan2.1_VAE.pth does not exist" in capsys.readouterr().err


def test_storyboards(program: Program, preview: Path) -> None:
    boards = program.file("boards.jsonl", '{"prompts": ["A red fox runs.", "A blue bird sings."]}\n')
    overrides = (f"data_path={boards}", "switch_frame_indices=6", "dummy_forcing.ar_start=1", "adapter=null")
    arguments = program.arguments(*overrides, f"decoder=taehv:{preview}", config="longlive_interactive_inference")
    assert interactive_inference.main(arguments) == 0
    assert probe(program.videos / f"{NAME}.mp4") == SMALL


def test_a_dry_run_shows_the_decoder(program: Program, preview: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program("--dry_run", f"decoder=taehv:{preview}", f"model_root={without_vae(program)}") == 0
    said = capsys.readouterr().out
    assert f"Decoding: by the preview decoder {preview}, of less quality than the VAE; whole frames" in said
    assert f"  ok      {preview}" in said and "Wan2.1_VAE" not in said
    nowhere = program.folder / "none.pth"
    assert program("--dry_run", f"decoder=taehv:{nowhere}") == 2
    captured = capsys.readouterr()
    assert f"  MISSING {nowhere}" in captured.out
    assert f"{nowhere} does not exist.\ndecoder: taew2_1.pth or taew2_1.safetensors of github.com" in captured.err


def test_memory_of_full_size() -> None:
    config = load_config(ROOT / "configs" / "self_forcing_inference.yaml", ["decoder=taehv:none.pth"])
    decoders = PreviewDecoder.published(torch.bfloat16), VAE.published(torch.bfloat16)
    small, large = (Planner(WAN_1_3B, decoder, torch.bfloat16) for decoder in decoders)
    settings = generator_settings(config, WAN_1_3B)
    assert small.memory(config, settings).vae == 2 * 9_844_611
    assert large.memory(config, settings).peak - small.memory(config, settings).peak > 2 << 30
    assert {strategy.tile for strategy in small.strategies(config)} == {None}


def test_a_plan_says_what_a_run_takes(program: Program, preview: Path) -> None:
    """At widths beside which, as at the real ones, three colours are few."""
    save_file(preview_weights((8, 16, 48, 48)), preview)
    check_the_plan(configure(program, "resolution=[128,192]", f"decoder=taehv:{preview}"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("decoder=tiny",), "decoder: must be wan or taehv:FILE (such as taehv:taew2_1.pth), got 'tiny'"),
        (("decoder=taew2_1.pth",), "got 'taew2_1.pth'"),
        (("decoder=wan:x.pth",), "got 'wan:x.pth'"),
        (("decoder=taehv:",), "decoder: expected text, got a section"),  # which it is in YAML
        (("decoder=taehv",), "decoder: taehv: the path is empty"),
        (("decoder=taehv:x.pth", "vae_tile=256"), "vae_tile: 256 is for decoder: wan; taehv:x.pth decodes whole"),
    ],
)
def test_settings_that_do_not_fit(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(ROOT / "configs" / "self_forcing_inference.yaml", overrides)
    assert message in str(caught.value)


def test_the_file_is_looked_for_as_all_weights_are(tmp_path: Path, preview: Path) -> None:
    yaml = tmp_path / "config.yaml"
    yaml.write_text(f"decoder: taehv:taew2_1.safetensors\nmodel_root: {tmp_path}\n")
    config = load_config(yaml)
    assert config.preview_path == preview
    assert load_config(as_dict(config)) == config
    assert load_config(yaml, ["decoder=wan"]).preview_path is None


def test_a_file_that_does_not_fit_is_found_before_the_text_encoder_is_read(program: Program, preview: Path) -> None:
    save_file({"decoder.1.weight": torch.zeros(8, 48, 3, 3)}, preview)
    root = program.folder / "checkpoints"
    shutil.copytree(program.model_root, root)
    (root / "Wan2.1-T2V-1.3B" / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(b"never read")
    config = configure(program, f"decoder=taehv:{preview}", f"model_root={root}")
    require_files(config)
    with pytest.raises(InputError, match="is no TAEHV decoder"):
        assemble(config, ["A red fox runs."], CPU)


def test_the_benchmark_shows_the_loss(
    program: Program, preview: Path, checkpoints: SmallCheckpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    given = program.folder / "given.mp4"
    with VideoWriter(given, 48, 32) as writer:
        writer.write(np.random.default_rng(0).integers(0, 255, (9, 32, 48, 3), np.uint8))
    small = ["--device", "cpu", "--resolution", "tiny", "--repeat", "1", "--frames", "3", "--preview", str(preview)]
    result = program.folder / "vae.json"
    for real in ([], ["--vae", str(checkpoints.vae), "--video", str(given)]):
        assert benchmark.main([*small, "--width", "8", *real, "--json", str(result)]) == 0
        theirs, ours, fast = json.loads(result.read_text())["rows"]
        assert [row["decoder"] for row in (theirs, ours, fast)] == ["Diffusers", "ours", "preview"]
        assert ours["decibel"] > 60
        assert fast["ratio"] == pytest.approx(theirs["clip_ms"] / fast["clip_ms"])
        assert (fast["decibel"] is None) == (not real)
    assert 0 < fast["decibel"] < 30  # random weights: nothing alike
    assert str(checkpoints.vae) in capsys.readouterr().out
