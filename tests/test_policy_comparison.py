"""python -m benchmarks.compare: policies side by side, by what their pixels say."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import compare, tables
from benchmarks.video_measures import measure
from pipeline.config.config import load_config
from tests.conftest import ROOT
from utils.errors import InputError
from utils.video import probe

needs_libraries = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("cv2", "torchmetrics")), reason="pip install -r requirements-dev.txt"
)
SHAPES, CALIBRATION = ROOT / "configs" / "shapes_demo.yaml", ROOT / "checkpoints" / "shapes" / "calibration.safetensors"


def moving_square(frames: int, step: int) -> torch.Tensor:
    """On a background that becomes one level brighter with every frame."""
    video = torch.from_numpy(np.random.default_rng(0).integers(60, 160, (1, 64, 96, 3), np.uint8))
    video = video.repeat(frames, 1, 1, 1) + torch.arange(frames, dtype=torch.uint8)[:, None, None, None]
    square = torch.from_numpy(np.random.default_rng(1).integers(0, 255, (24, 24, 3), np.uint8))
    for number in range(frames):
        video[number, 20:44, 10 + step * number : 34 + step * number] = square
    return video


@needs_libraries
def test_what_is_measured() -> None:
    still, moving = moving_square(9, 0), moving_square(9, 3)
    same = measure(still, still, [5])
    assert (same.psnr, same.ssim, same.drift) == (60, pytest.approx(1), pytest.approx(8))
    assert same.seam == pytest.approx(1, abs=0.01) and same.motion < 0.1
    other = measure(moving, still, [5])
    assert other.psnr < 30 and other.ssim < 0.95 and other.motion > same.motion + 0.1
    assert other.drift == pytest.approx(8)  # what moves covers less than half
    jump = still.clone()
    jump[5:] += 20
    assert measure(jump, still, [5]).seam == pytest.approx(21, rel=0.2)


@needs_libraries
def test_policies_on_the_small_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A red ball moves to the right.\nA green triangle grows.\n")
    given = ["--policies", "full,packed,calibrated:1.33,window:4", "--prompts", str(prompts), "--videos", "1"]
    where = ["--calibration", str(CALIBRATION), "--out", str(tmp_path / "out"), f"model_root={ROOT / 'checkpoints'}"]
    assert compare.main([str(SHAPES), *given, *where, "num_output_frames=9"]) == 0
    made = probe(tmp_path / "out" / "comparison.mp4")
    assert (made.frames, made.width, made.height) == (33, 4 * 128, 80 + 16)
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())["policies"]
    assert list(rows) == ["full", "packed", "calibrated:1.33", "window:4"]
    assert rows["full"]["context"] == 6 and rows["window:4"]["context"] == 1
    assert "psnr" not in rows["full"] and 10 < rows["packed"]["psnr"]["mean"] < 60
    assert rows["calibrated:1.33"]["cache_bytes"] < rows["full"]["cache_bytes"]
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert text in capsys.readouterr().out and "| full | 6.00 | - | - |" in text
    assert tables.compare({"policies": rows}) + "\n" == text


@pytest.mark.parametrize(
    "policy", ["full", "window:6", "packed", "prune", "anchor", "calibrated:2", "calibrated:full", "online:2"]
)
@pytest.mark.parametrize("name", ["shapes_demo", "self_forcing_calibrated", "longlive_long_context"])
def test_a_policy_can_be_had_from_any_configuration(policy: str, name: str) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    made = load_config(ROOT / "configs" / f"{name}.yaml", compare.overrides_of(policy, config, "file.safetensors"))
    forcing, kind = made.dummy_forcing, policy.partition(":")[0]
    assert forcing.enabled == (kind not in ("full", "window"))
    if forcing.enabled:
        assert forcing.policy == {"anchor": "packed", "online": "calibrated"}.get(kind, kind)
        assert forcing.online == (kind == "online")
        assert made.model_kwargs == config.model_kwargs
    assert made.data_path == config.data_path and made.resolution == config.resolution


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--policies", "ful"], "--policies: 'ful' is none; write full, window"),
        (["--policies", "calibrated"], "--policies: 'calibrated' is none"),
        (["--policies", "packed:2"], "--policies: 'packed:2' is none"),
        (["--policies", "full,window"], "--policies: window: the configuration has none"),
        (["--policies", "full,window:x"], "model_kwargs.local_attn_size"),
        (["--policies", "full,calibrated:-1", "--calibration", "f"], "dummy_forcing.frames_per_head"),
        (["--policies", "full,calibrated:1"], "dummy_forcing.calibration: policy calibrated needs a file"),
        (["--policies", "full,calibrated:1", "--calibration", "nope"], "dummy_forcing.calibration"),
        (["--policies", "full", "--prompts", "nope.txt"], "data_path: nope.txt"),
        (["--policies", "full", "dummy_forcing=off", "num_output_frames=3"], "num_output_frames: 3 is one block"),
        (["--policies", "full", "--out", "README.md"], "--out: README.md is a file"),
        (["--policies", "full", "model_root=nowhere"], "nowhere"),
    ],
)
@needs_libraries
def test_what_cannot_be_compared_is_said(
    arguments: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert compare.main([str(SHAPES), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and expected in error and error.count("error:") == 1


def test_an_empty_list_of_policies_is_refused() -> None:
    with pytest.raises(InputError, match="--policies: '' is none"):
        compare.overrides_of("", load_config(SHAPES), None)
