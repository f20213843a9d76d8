"""The frontier: its arithmetic, and the shortest run on the checkpoint that ships."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text

from dummy.presets import PRESETS
from pipeline.config.config import load_config
from shapes import claims, frontier
from shapes import frontier_report as report
from shapes.evaluate import CONFIG
from shapes.frontier_plot import draw
from tests.conftest import ROOT


@pytest.mark.parametrize("name", frontier.points())
def test_every_point_is_a_configuration(name: str) -> None:
    config = load_config(ROOT / CONFIG, frontier.points()[name])
    forcing = config.dummy_forcing
    assert forcing.enabled == (name != "full" and not name.startswith("window"))
    assert name.split()[0] in (*PRESETS, "full", "window", "prune", "calibrated", "online")
    if name.split()[0] in PRESETS:
        assert forcing.preset == name.split()[0]


def test_the_pareto_set_is_what_nothing_beats() -> None:
    cost = {"a": 1.0, "b": 2.0, "c": 2.0, "d": 3.0, "e": 3.0}
    value = {"a": 5.0, "b": 4.0, "c": 6.0, "d": 6.0, "e": 9.0}
    assert report.pareto(cost, value, more_is_better=True) == ["a", "c", "e"]
    assert report.pareto(cost, value, more_is_better=False) == ["a", "b"]


def values(drift: float, seam: float, context: float, spread: float = 0.1) -> report.Values:
    rng = np.random.default_rng(1)
    found = report.Values(block_ms=[10.0 * context], context=[context])
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
    rows = report.summary(found, {name: [] for name in found})["points"]
    assert report.better_at_the_cost(rows, report.better_in_both) == ["both"]
    assert report.better_at_the_cost(rows, report.better_in_one) == ["drift"]
    # Caption by caption the difference is clear, though the captions differ by far more.
    against = rows["both"]["against_original"]["drift"]
    assert against["low"] > 0.9 and rows["both"]["drift"]["low"] < 30
    text = report.table({"points": rows})
    assert "both beyond their intervals: both." in text and "not worse: drift." in text
    line = next(line for line in text.splitlines() if line.startswith("| drift |") and "+" in line)
    assert line.startswith("| drift | 1.50 | +0.00 [+0.00, +0.00] | **+1.0")  # bold in drift alone
    assert line.count("**") == 2


def test_without_the_original_nothing_is_compared() -> None:
    rows = report.summary({"full": values(40, 1.0, 15.0)}, {"full": []})["points"]
    assert "paper" not in report.table({"points": rows})


def test_the_drawing_names_what_nothing_beats() -> None:
    found = {"full": values(40, 1.0, 15.0), "paper": values(30, 1.5, 1.5), "poor": values(20, 1.6, 3.0)}
    found |= {f"point {number}": values(35, 1.2, 1.5 + 0.01 * number) for number in range(6)}
    drawn = draw(report.summary(found, {name: [] for name in found}))
    words = [text.get_text() for text in drawn.findobj(Text)]
    assert words.count("paper") == words.count("full") == 2 * len(report.MEASURES)
    assert 0 < words.count("point 0") <= len(report.MEASURES) and "poor" not in words
    found |= {"point 0 again": found["point 0"]}
    drawn = draw(report.summary(found, {name: [] for name in found}))
    assert "point 0 again" not in [text.get_text() for text in drawn.findobj(Text)]  # it lies on the other
    assert {"earlier latent frames a head sees", "time of a block, median, ms"} <= set(words)


def test_the_stored_frontier_is_drawn_as_it_is() -> None:
    rows = json.loads(claims.FRONTIER.read_text())["points"]
    drawn = draw({"points": rows})
    drawn.draw_without_rendering()
    for number, axes in enumerate(drawn.axes):
        measure, cost = list(report.MEASURES)[number // 2], ("context", "block_ms")[number % 2]
        factor, shown = report.MEASURES[measure][1], [row for row in rows.values() if measure in row]
        points = [line.get_xydata() for line in axes.lines if line.get_linestyle() == "None"]
        expected = sorted([row[cost], factor * row[measure]["mean"]] for row in shown)
        assert sorted(np.concatenate(points).tolist()) == pytest.approx(np.array(expected))
        bars = [bar.tolist() for bars in axes.collections for bar in bars.get_segments()]
        ends = sorted([[row[cost], factor * row[measure][end]] for end in ("low", "high")] for row in shown)
        assert np.array(sorted(bars)) == pytest.approx(np.array(ends))
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) >= 3 and not any(one.overlaps(other) for one, other in combinations(boxes, 2))
        room = axes.get_window_extent()
        assert all(room.containsx(x) and room.containsy(y) for box in boxes for x, y in (box.min, box.max))


@pytest.mark.parametrize("names", [[], ["full"], ["full", "paper"]])
def test_a_frontier_of_few_points_is_drawn(names: list[str]) -> None:
    rows = report.summary({name: values(40, 1.0, 15.0) for name in names}, {name: [] for name in names})["points"]
    for row in rows.values():
        del row["psnr"]
    assert [text.get_text() for axes in draw({"points": rows}).axes for text in axes.texts] == names * 6


def test_the_shortest_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--short", "--captions", "2", "--batch", "2", "--threads", "1", "--out", str(tmp_path)]
    where = ["--config", str(ROOT / CONFIG), "--set", f"model_root={ROOT / 'checkpoints'}", "num_output_frames=15"]
    assert frontier.main([*arguments, *where]) == 0
    content = json.loads((tmp_path / "frontier.json").read_text())
    points = content["points"]
    assert list(points) == ["full", "paper", "traded"]
    assert points["full"]["context"] == 12 and points["paper"]["context"] < points["full"]["context"]
    assert "psnr" not in points["full"] and points["paper"]["psnr"]["n"] == 2
    printed = capsys.readouterr().out
    assert "| traded |" in printed and "| full | 12.00 |" in printed
    again = tmp_path / "again"
    assert frontier.main(["--from", str(tmp_path / "frontier.json"), "--out", str(again)]) == 0
    assert capsys.readouterr().out == printed == (again / "frontier.md").read_text()
    assert (again / "frontier.svg").read_text() == (tmp_path / "frontier.svg").read_text()
    ET.parse(again / "frontier.svg")
    assert (again / "frontier.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--points", "papper"], "--points: 'papper': none of full, "),
        (["--captions", "0"], "--captions: expected a whole number from 1 on, got '0'"),
        (["--captions", "-1"], "--captions"),
        (["--seeds", "0"], "--seeds"),
        (["--batch", "0"], "--batch"),
        (["--config", "nope.yaml"], "error: nope.yaml: no such"),
        (["--set", "foo=1"], "error: foo: unknown key"),
        (["--set", "num_output_frames=9"], "num_output_frames: steady blocks begin with the fourth, got 9"),
        (["--set", "resolution=[32,48]"], "resolution: the world has 80 x 128 pixels"),
        (["--from", "nope.json"], "--from: nope.json cannot be read"),
        (["--from", CONFIG], "cannot be read as a frontier.json"),
        (["--from", "benchmarks/results/shapes.json"], "cannot be read as a frontier.json"),
        (["--out", "README.md"], "--out: README.md is a file"),
    ],
)
def test_bad_input_is_named(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    try:
        status: object = frontier.main(["--out", str(tmp_path), *arguments])
    except SystemExit as refused:
        status = refused.code
    assert status == 2
    assert expected in capsys.readouterr().err


def test_claims_are_read_off_the_stored_results() -> None:
    text = claims.stored()
    assert "heads above 80 %: 5 of 24" in text and "overlap between blocks | 0.92 (paper: 0.92" in text
    assert "at most 0.205, 0.104, 0.089, 0.074, 0.229 in blocks 1, 2, 3, 4, 5" in text
    assert "alike is 0.167, 0.111, 0.083, 0.067, 0.056; heads with more" in text and "ones: 1 |" in text
    stored = json.loads(claims.FRONTIER.read_text())["points"]["paper at window 7"]["quality"]["mean"]
    assert f"`paper at window 7` 3.36 frames a head, {100 * stored:.1f} % right" in text
