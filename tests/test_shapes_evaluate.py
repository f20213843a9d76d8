"""The report's arithmetic, its gate, and the whole evaluation on the checkpoint that ships, in its shortest form."""

from __future__ import annotations

import json
import math
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from pipeline.config.config import load_config
from shapes import evaluate
from shapes.data import make_clip
from shapes.report import Report, check_gate, main, plot, table, write_report
from utils import command
from utils.errors import InputError
from utils.seed import video_seed
from wan.transformer.fp8 import Fp8Linear

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "checkpoints" / "shapes" / "Wan2.1-T2V-shapes"


def small_report() -> Report:
    report = Report(["full", "packed"])
    for number in range(20):
        right = {"colour": 1.0, "shape": 1.0, "motion": 1.0, "remembered": 1.0}
        report.add("full", {**right, "position": 1.0, "psnr": math.nan})
        wrong = float(number % 4 > 0)
        report.add("packed", {**right, "motion": wrong, "position": 2.0 + number % 2, "psnr": 30.0})
    report.add_batch("full", [9.0, 9.0, 9.0, 20.0, 22.0], None)
    report.add_batch("packed", [9.0, 9.0, 9.0, 12.0, 12.0], torch.full((2, 3), 0.9))
    return report


def test_means_and_intervals() -> None:
    report = small_report()
    assert report.mean("packed", "motion") == 0.75
    low, high = report.interval("packed", "motion")
    assert 0.5 < low < 0.75 < high < 1.0
    assert report.interval("full", "motion") == (1.0, 1.0)
    assert report.mean("full", "psnr") is None  # NaN is left out
    assert report.mean("full", "block_ms") == 21.0
    text = table(report.as_dict())
    assert "75.0 [" in text and "6 heads above 80 %" in text


def test_the_report_is_written_in_three_forms(tmp_path: Path) -> None:
    write_report(small_report(), tmp_path, {"command": "x"})
    loaded = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["policies"]
    assert loaded["packed"]["motion"]["n"] == 20 and loaded["packed"]["current_share"][0] == [0.9, 0.9, 0.9]
    drawing = ET.parse(tmp_path / "report.svg").getroot()
    written = [element.text for element in drawing.iter() if element.tag.endswith("}text")]
    assert {"full", "packed", "time of a block, ms"} <= set(written)


def test_the_plot_has_a_point_with_both_intervals_a_policy() -> None:
    policies = small_report().as_dict()
    (axes,) = plot(policies).axes
    points = next(line for line in axes.lines if line.get_linestyle() == "None")
    assert points.get_xydata().tolist() == [[21.0, 100.0], [12.0, pytest.approx(93.75)]]
    times, rights = ([bar.tolist() for bar in bars.get_segments()] for bars in axes.collections)
    low, high = (100 * policies["packed"]["quality"][end] for end in ("low", "high"))
    assert times[0] == [[21.0, 100.0], [21.0, 100.0]] and rights[1] == [[12.0, low], [12.0, high]]
    # What was not timed, or not scored, has no point.
    half = {"full": policies["full"], "timed": {"block_ms": policies["full"]["block_ms"]}, "nothing": {}}
    assert [text.get_text() for text in plot(half).axes[0].texts] == ["full"]


def test_a_stored_report_is_drawn_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(small_report(), tmp_path, {})
    first = (tmp_path / "report.svg").read_bytes()
    (tmp_path / "report.svg").unlink()
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "report.json"), str(tmp_path / "report.svg")])
    main()
    assert (tmp_path / "report.svg").read_bytes() == first


@pytest.mark.parametrize(
    ("bounds", "status"),
    [
        ({"packed": {"motion": {"min": 0.7}, "position": {"max": 3.0}}}, 0),
        ({"packed": {"motion": {"min": 0.8}}}, 1),
        ({"packed": {"position": {"max": 2.0}}}, 1),
        ({"window": {"motion": {"min": 0.1}}}, 1),  # what was not measured is not kept
        ({"full": {"psnr": {"min": 1.0}}}, 1),
    ],
)
def test_the_gate(bounds: dict[str, dict[str, dict[str, float]]], status: int, tmp_path: Path) -> None:
    path = tmp_path / "gate.json"
    path.write_text(json.dumps(bounds), encoding="utf-8")
    assert check_gate(small_report(), path) == status


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ("nothing", "is not a JSON file"),
        ("[]", "expected a section with entries, got []"),
        ('{"full": {"colour": 0.9}}', "full: colour: expected a section with entries, got 0.9"),
        ('{"full": {"colour": {"mn": 0.9}}}', "full: colour: expected min, max or both, got {'mn': 0.9}"),
        ('{"full": {"colour": {"min": "0.9"}}}', "full: colour: expected min, max or both"),
    ],
)
def test_a_gate_that_keeps_nothing_is_refused_before_videos_are_made(
    bounds: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gate.json"
    path.write_text(bounds, encoding="utf-8")
    arguments = ["--gate", str(path), "--out", str(tmp_path), "--threads", str(torch.get_num_threads())]
    assert command.run(lambda: evaluate.main(arguments), log_format=None) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --gate: {path}: ") and said in error


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (["--set", "resolution=[64,64]"], "resolution: the world has 80 x 128 pixels"),
        (
            ["--policies=full", "--set", "num_output_frames=9", "--storyboards=0"],
            "num_output_frames: steady blocks begin with the",
        ),
        (["--set", "num_output_frames=15"], "num_output_frames: storyboards switch at frame 12 and go on for two"),
        (["--set", "model_root=/none"], "/none"),
        (["--out", "README.md"], "--out: README.md is a file"),
        (["--set", "device=cuda", "start_from=x.png"], "device, start_from: scored videos begin with noise"),
    ],
)
def test_what_cannot_be_evaluated_is_said(
    others: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    arguments = ["--out", str(tmp_path), *others, "--threads", str(torch.get_num_threads())]
    assert command.run(lambda: evaluate.main(arguments), log_format=None) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("given", ["--batch 0", "--captions 0", "--long -1", "--seeds x"])
def test_numbers_that_mean_nothing_are_refused(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(given.split())
    assert "expected a whole number from" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[]", "{}", '{"policies": {"full": {"quality": 1, "block_ms": 2}}}'])
def test_what_is_no_report_is_not_drawn(content: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(InputError, match="is no report of"):
        main([str(path), str(tmp_path / "report.svg")])
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("name", evaluate.POLICIES)
def test_every_policy_is_the_one_that_it_is_called(name: str) -> None:
    config = load_config(ROOT / evaluate.CONFIG, evaluate.POLICIES[name])
    kind, _, frames = name.partition(":")
    assert config.policy == {"anchored": "packed", "online": "calibrated", "truth": "full"}.get(kind, kind)
    assert not frames or config.dummy_forcing.frames_per_head == float(frames)


@pytest.mark.parametrize(
    "path", ["configs/shapes_demo.yaml", "configs/shapes_calibrated.yaml", "configs/shapes_interactive.yaml"]
)
def test_the_configurations_fit_the_model(path: str) -> None:
    config = load_config(ROOT / path)
    assert config.num_output_frames == 21 and config.latent_size == (10, 16)
    assert (ROOT / config.data_path).is_file()


def test_the_checkpoint_is_small_and_complete() -> None:
    files = [path for path in CHECKPOINT.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12 << 20
    names = {str(path.relative_to(CHECKPOINT)) for path in files if CHECKPOINT in path.parents}
    wanted = {"config.json", "diffusion_pytorch_model.safetensors", "Wan2.1_VAE.pth"}
    assert wanted | {"models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/tokenizer.json"} <= names
    assert (CHECKPOINT.parent / "README.md").is_file()


def test_the_evaluation_in_short_keeps_the_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The trained model, the loop and the policies are as good as they were: bounds with room for another machine."""
    arguments = ["--config", str(ROOT / evaluate.CONFIG), "--set", f"model_root={ROOT / 'checkpoints'}"]
    chosen = {
        "policies": "full,prune,packed,calibrated:1.33",
        "captions": 6,
        "storyboards": 4,
        "ten": 0,
        "long": 0,
        "batch": 8,
    }
    arguments += [f"--{name}={value}" for name, value in chosen.items()]
    gate = ["--gate", str(ROOT / "shapes" / "gate.json")]
    assert evaluate.main([*arguments, *gate, "--threads", "1", "--out", str(tmp_path)]) == 0
    assert "| colour % |" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["policies"]
    assert report["packed"]["psnr"]["n"] == 6 and "psnr" not in report["full"]
    assert report["full"]["later_right"]["n"] == 4
    kinds = [report["full"].get(f"later_{kind}_right", {"n": 0})["n"] for kind in ("command", "scene")]
    assert sum(kinds) == 4
    assert len(report["packed"]["current_share"]) == 4


def test_precisions_are_those_of_the_product() -> None:
    config = load_config(ROOT / evaluate.CONFIG, [*evaluate.POLICIES["full"], f"model_root={ROOT / 'checkpoints'}"])
    loaded = evaluate.Parts.load(config)
    half, eighth = (loaded.of(name).model for name in ("full@bf16", "full@fp8"))
    assert (loaded.model.dtype, half.dtype, eighth.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert isinstance(eighth.layers()[0].ffn[0], Fp8Linear) and not isinstance(half.layers()[0].ffn[0], Fp8Linear)
    assert loaded.of("full") is loaded


@pytest.mark.parametrize("name", ["full@fp16", "fulll", "@fp8", "truth@bf16"])
def test_unknown_policies_are_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(["--policies", f"full,{name}"])
    assert f"--policies: '{name}' is none of full, window" in capsys.readouterr().err


def test_full_history_is_what_others_are_measured_against(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(["--policies", "window,packed"])
    assert "--policies: full comes first, by which PSNR goes" in capsys.readouterr().err


def test_noise_depends_on_a_clips_place_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on its switches, nor on how many there are; clips of a batch have their switches together."""
    monkeypatch.setattr(evaluate, "_batch", lambda parts, config, clips, seeds: seeds)
    config = load_config(evaluate.CONFIG)
    clips = [make_clip(1, i, (evaluate.SWITCHES[i % 3],)) for i in range(10)]
    parts = cast(evaluate.Parts, SimpleNamespace(truth=False))
    for count in (4, 10):
        seeds = {}
        for found, group in evaluate.generate(parts, config, clips[:count], 3):
            assert len(group) <= 3 and len({clip.starts for clip in group}) == 1
            seeds |= {clips.index(clip): seed for clip, seed in zip(group, cast("list[int]", found), strict=True)}
        assert seeds == {place: video_seed(config.seed, place, 0) for place in range(count)}


def test_the_truth_through_the_vae_is_right(tmp_path: Path) -> None:
    numbers = ["--captions=1", "--storyboards=1", "--ten=0", "--long=0", "--threads=1"]
    places = ["--config", str(ROOT / evaluate.CONFIG), "--out", str(tmp_path)]
    arguments = ["--policies=truth", *numbers, *places, "--set", f"model_root={ROOT / 'checkpoints'}"]
    assert evaluate.main(arguments) == 0
    truth = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["policies"]["truth"]
    assert all(truth[name]["mean"] == 1 for name in ("colour", "shape", "motion", "remembered", "later_right"))
    assert truth["position"]["mean"] < 0.5 and "block_ms" not in truth
