"""What a run that is ended in the middle leaves behind: whole videos, no process, and something to go on from."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, Program
from utils.video import probe

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
PROMPTS = [f"Prompt number {i}." for i in range(6)]
SIZE = ("resolution=[64,96]", "num_output_frames=12")  # about a second a video: time to hit the middle of one


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes] | None = None) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "nothing happened for two minutes"
        assert process is None or process.poll() is None, "the run ended by itself"
        time.sleep(0.02)


def processes_that_mention(path: Path) -> list[str]:
    """Command lines of running processes (Linux; elsewhere none are seen)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes()
        except OSError:  # it has ended meanwhile
            continue
        if str(path).encode() in command and str(os.getpid()) != entry.parent.name:
            found.append(command.decode("utf-8", "replace").replace("\0", " "))
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_run_that_is_ended_leaves_whole_videos(program: Program, number: signal.Signals) -> None:
    command = [sys.executable, "inference.py", *program.arguments(*SIZE, prompts=PROMPTS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # Where the tests run in the background of a shell, SIGINT is ignored and children inherit that.
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_for(lambda: bool(program.mp4s) and bool(program.unfinished), process)
    time.sleep(0.3)  # into the middle of the second video
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    # A killed program cannot end ffmpeg, which ends by itself when no more frames come.
    wait_for(lambda: not processes_that_mention(program.videos))
    finished = program.mp4s
    assert 1 <= len(finished) < len(PROMPTS)
    for name in finished:
        assert probe(program.videos / name).frames == 45
    if number is signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        assert len(program.unfinished) <= 1
    else:
        assert process.returncode == 130
        assert program.unfinished == []
        assert b"Traceback" not in said and b"interrupted" in said
    goes_on(program, finished)


def test_no_video_has_its_name_before_its_metadata_is_there(program: Program) -> None:
    """What stops a run between the two leaves no video that nothing is known of; the next run makes it."""
    one = ("overwrite=true",)
    assert program(*one, prompts=PROMPTS[:1]) == 0
    (metadata,) = program.videos.glob("*.json")
    for path in (metadata, *program.videos.glob("*.mp4")):
        path.unlink()
    (metadata / "in the way").mkdir(parents=True)
    assert program(*one, prompts=PROMPTS[:1]) == 2
    assert not program.mp4s and not program.unfinished
    (metadata / "in the way").rmdir()
    metadata.rmdir()
    metadata.write_text("{}")  # of a video that did not come to be
    assert program(*one, prompts=PROMPTS[:1]) == 0
    assert len(program.mp4s) == 1 and "noise_seed" in json.loads(metadata.read_text())


def goes_on(program: Program, finished: dict[str, bytes]) -> None:
    """A second run keeps what is whole, makes one more, and clears away what the first left unfinished."""
    times = {name: (program.videos / name).stat().st_mtime_ns for name in finished}
    assert program(*SIZE, f"inference_iter={len(finished) + 1}", prompts=PROMPTS) == 0
    assert len(program.mp4s) == len(finished) + 1
    assert {name: (program.videos / name).stat().st_mtime_ns for name in finished} == times
    assert program.unfinished == []


def test_a_video_that_cannot_be_made_again_stays(program: Program) -> None:
    one = (*SIZE, "inference_iter=1")
    assert program(*one, prompts=PROMPTS[:1]) == 0
    (metadata,), before = program.videos.glob("*.json"), program.mp4s
    metadata.unlink()
    metadata.mkdir()  # so that it cannot be written
    assert program(*one, "overwrite=true", "seed=1", prompts=PROMPTS[:1]) == 2
    assert program.mp4s == before and not program.unfinished
