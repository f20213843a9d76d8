"""The frontier: its arithmetic, and the shortest run on the checkpoint that ships."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from dummy.presets import PRESETS
from pipeline.config import load_config
from shapes import frontier
from shapes.evaluate import CONFIG
from tests.conftest import ROOT


@pytest.mark.parametrize("name", frontier.points())
def test_every_point_is_a_configuration(name: str) -> None:
    config = load_config(ROOT / CONFIG, frontier.points()[name])
    forcing = config.dummy_forcing
    assert forcing.enabled == (name != "full" and not name.startswith("window"))
    assert name.split()[0] in (*PRESETS, "full", "window", "prune")
    if name.split()[0] in PRESETS:
        assert forcing.preset == name.split()[0]


def test_the_pareto_set_is_what_nothing_beats() -> None:
    cost = {"a": 1.0, "b": 2.0, "c": 2.0, "d": 3.0, "e": 3.0}
    value = {"a": 5.0, "b": 4.0, "c": 6.0, "d": 6.0, "e": 9.0}
    assert frontier.pareto(cost, value, more_is_better=True) == ["a", "c", "e"]
    assert frontier.pareto(cost, value, more_is_better=False) == ["a", "b"]


def values(drift: float, seam: float, context: float, spread: float = 0.1) -> frontier.Values:
    rng = np.random.default_rng(1)
    found = frontier.Values(block_ms=[10.0], context=[context])
    for _ in range(40):
        common = float(rng.normal(0, 5))  # captions differ more than policies do
        noise = float(rng.normal(0, spread))
        found.add({"quality": 0.5, "drift": drift + common + noise, "seam": seam + noise, "psnr": 30.0})
    return found


def test_better_at_the_cost_needs_both_and_the_interval() -> None:
    found = {
        "full": values(40, 1.0, 15.0),
        "paper": values(30, 1.5, 1.5),
        "both": values(31, 1.4, 1.5),
        "drift": values(31, 1.5, 1.5),
        "dear": values(31, 1.4, 2.0),
    }
    content = frontier.summary(found, {name: [] for name in found})
    assert content["better_at_the_cost"] == ["both"]
    # Caption by caption the difference is clear, though the captions differ by far more.
    against = content["points"]["both"]["against_original"]["drift"]
    assert against["low"] > 0.9 and content["points"]["both"]["drift"]["low"] < 30
    assert "both" in frontier.table(content) and "none" not in frontier.table(content)


def test_the_shortest_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--short", "--captions", "2", "--batch", "2", "--threads", "1", "--out", str(tmp_path)]
    where = ["--config", str(ROOT / CONFIG), "--set", f"model_root={ROOT / 'checkpoints'}", "num_output_frames=15"]
    assert frontier.main([*arguments, *where]) == 0
    content = json.loads((tmp_path / "frontier.json").read_text())
    points = content["points"]
    assert list(points) == ["full", "paper", "traded"]
    assert points["full"]["context"] == 12 and points["paper"]["context"] < points["full"]["context"]
    assert "psnr" not in points["full"] and points["paper"]["psnr"]["n"] == 2
    assert set(content["pareto"]) == set(frontier.MEASURES)
    assert "| traded |" in capsys.readouterr().out
    ET.parse(tmp_path / "frontier.svg")
    assert (tmp_path / "frontier.png").stat().st_size > 5000


def test_unknown_points_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        frontier.main(["--points", "papper"])
    assert "papper" in capsys.readouterr().err
