"""Programs that drive the studio: the recorder, and the one of the documentation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from studio import client
from tests.studio_server import ROOT, Studio, until
from utils.video import probe

SCRIPT = "0 A large red ball moves to the right.\n1 It turns blue.\n"


def test_a_script_becomes_a_video(studio: Studio, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "script.txt").write_text(SCRIPT)
    out = tmp_path / "video.mp4"
    given = ["--url", studio.url, "--script", str(tmp_path / "script.txt"), "--seed", "3", "--seconds", "2"]
    assert client.main([*given, "--out", str(out)]) == 0
    assert "33 frames" in capsys.readouterr().out and probe(out).frames == 33
    assert '"switch_frame_indices": [6]' in out.with_suffix(".jsonl").read_text()
    assert client.main([*given, "--out", str(tmp_path / "again.mp4")]) == 0
    assert (tmp_path / "again.mp4").read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--url", "http://127.0.0.1:9"], "url: no studio answers at http://127.0.0.1:9"),
        (["--url", "nonsense"], "url: expected an address"),
        (["--url", "http://127.0.0.1:99999"], "url: no studio answers at http://127.0.0.1:99999"),
        (["--seconds", "nan"], "seconds: must be more than 0, got nan"),
        (["--seconds", "-3"], "seconds: must be more than 0, got -3"),
        (["--out", "video.avi"], "out: video.avi must end in .mp4"),
        (["--script", "nowhere"], "script: nowhere: there is no such script"),
        (["--policy", "nonsense"], "the studio says: policy: 'nonsense' is none of"),
    ],
)
def test_what_is_wrong_is_told(
    studio: Studio, given: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "script.txt").write_text(SCRIPT)
    usual = ["--url", studio.url, "--script", str(tmp_path / "script.txt"), "--out", str(tmp_path / "video.mp4")]
    assert client.main([*usual, *given]) == 2
    assert f"error: {said}" in capsys.readouterr().err
    until(lambda: not studio.house.parts.lobby.rooms, "the end of the session")


def test_where_a_video_goes_is_looked_at_first(
    studio: Studio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "script.txt").write_text(SCRIPT)
    (tmp_path / "folder.mp4").mkdir()
    for out, said in (("folder.mp4", "is a folder"), ("nowhere/video.mp4", "nowhere")):
        given = ["--url", "http://127.0.0.1:9", "--script", str(tmp_path / "script.txt")]
        assert client.main([*given, "--out", str(tmp_path / out)]) == 2
        assert said in capsys.readouterr().err


def test_the_program_of_the_documentation_runs(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "studio.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(program.splitlines()) <= 25
    monkeypatch.setenv("STUDIO_SOCKET", f"ws://127.0.0.1:{studio.port}/ws")
    exec(compile(program, "docs/studio.md", "exec"), {})
    said = capsys.readouterr().out
    assert "frame 0: A large red ball moves to the right." in said and "It turns blue." in said
