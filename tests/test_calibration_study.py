"""The study of calibrations: its arithmetic, and the shortest run on the checkpoint that ships."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dummy.calibration.measured import Calibration
from shapes import calibration_study as study
from shapes.calibration_trials import evenly, powered
from shapes.evaluate import CALIBRATION
from tests.conftest import ROOT


def test_changed_errors_are_what_they_are_called() -> None:
    usual = Calibration.load(ROOT / CALIBRATION, "")
    mean = usual.mean_errors()
    torch.testing.assert_close(powered(0.5)(usual).mean_errors(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(powered(1)(usual).mean_errors(), mean**2, rtol=1e-5, atol=1e-6)
    alike = usual.errors.double().mean((0, 1)) * len(usual.blocks)
    torch.testing.assert_close(evenly(usual).mean_errors(), alike.sqrt(), rtol=1e-5, atol=1e-6)


def test_the_shortest_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    short = ["--captions", "1", "--frames", "1.33", "--questions", "others,lengths", "--out", str(tmp_path)]
    assert study.main(short) == 0
    rows = json.loads((tmp_path / "study.json").read_text())["rows"]
    assert [row["trial"] for row in rows][:3] == ["usual", "paper", "window 7"] and len(rows) == 7
    found = {row["trial"]: row for row in rows}
    assert found["usual"]["db"]["mean"] > found["paper"]["db"]["mean"]
    assert found["at most 4 lengths"]["less_usual"]["mean"] == pytest.approx(0, abs=0.5)
    out = capsys.readouterr().out
    assert "| question | trial | 1.33 frames |\n" in out and "| lengths | at most 1 lengths |" in out


def test_a_question_that_nobody_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert study.main(["--out", str(tmp_path), "--questions", "others,more"]) == 2
    assert "error: --questions: 'more': none of others, score" in capsys.readouterr().err
