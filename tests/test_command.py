"""What all commands share: consoles that lack characters, options that are settings, and how a command ends."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import inference
import sample_vbench
from pipeline.atlas import command as atlas
from pipeline.calibrate import command as calibrate
from tests.conftest import Program
from utils import command
from utils.errors import InputError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_console_without_the_characters_of_a_prompt_loses_no_video(
    program: Program, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setattr(sys, "stderr", console)
    prompts = ("一只红色的狐狸", "🦊 runs")
    small = ("num_output_frames=3", "dummy_forcing=off", "resolution=[16,32]", "save_with_index=false")
    assert program(*small, prompts=prompts) == 0
    assert sorted(program.mp4s) == ["一只红色的狐狸-0.mp4", "🦊 runs-0.mp4"]
    assert program("data_path=一只狐狸.txt") == 2
    console.seek(0)
    said = console.read()
    assert r"/\u4e00\u53ea\u7ea2" in said and r"/\U0001f98a runs-0.mp4" in said
    assert r"error: data_path: \u4e00\u53ea" in said


@pytest.mark.parametrize("main", [inference.main, sample_vbench.main, atlas.main, calibrate.main])
def test_options_that_are_settings_are_answered_with_how_to_write_them(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--output_folder", "X y", "--use_ema", "seed=1", "--num-samples=3", "--i2v", "--config_path", "a.yaml"]
    with pytest.raises(SystemExit) as caught:
        main(given)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "settings are written without dashes: 'output_folder=X y' use_ema=true num_samples=3 i2v=true\n" in said
    assert said.count("error: ") == 1


@pytest.mark.parametrize("said", [{}, {"PYTORCH_ALLOC_CONF": "x"}, {"PYTORCH_CUDA_ALLOC_CONF": "x"}], ids=str)
def test_memory_grows_in_place_unless_the_user_says_how(said: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    names = command.ALLOCATOR_SETTINGS
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert command.run(lambda: 0, log_format=None) == 0
    found = {name: os.environ.pop(name) for name in names if name in os.environ}
    assert found == (said or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


def test_how_commands_end(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> int:
        raise InputError("seed: \x1b[31m is no number")

    def lack_a_file() -> int:
        return len(open("/no/such\x1bfile").read())

    def interrupt() -> int:
        raise KeyboardInterrupt

    assert [command.run(program) for program in (lambda: 7, refuse, lack_a_file, interrupt)] == [7, 2, 2, 130]
    assert capsys.readouterr().err.splitlines() == [
        r"error: seed: \x1b[31m is no number",
        r"error: /no/such\x1bfile: No such file or directory. Check the path and its permissions.",
        "interrupted; what is finished is kept, what is unfinished is removed",
    ]
    with pytest.raises(ZeroDivisionError):  # the program's own fault
        command.run(lambda: 1 // 0)
    with pytest.raises(OSError, match="of no file"):
        command.run(lambda: (_ for _ in ()).throw(OSError("of no file")))


@pytest.mark.parametrize(("lines", "unbuffered"), [(1, ""), (10_000, ""), (1, "1")])
@pytest.mark.parametrize("reader", ["a full disk", "nobody"])
def test_what_cannot_be_printed(reader: str, lines: int, unbuffered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    script = f"""
import sys
from utils import command

def program():
    for number in range({lines}):
        print("line", number)
    return 0

sys.exit(command.run(program))
"""
    if reader == "nobody":
        receiver, sender = os.pipe()
        os.close(receiver)
    else:
        sender = os.open("/dev/full", os.O_WRONLY)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=sender, stderr=subprocess.PIPE, text=True)
    os.close(sender)
    said = "error: stdout: cannot be written (No space left on device). Free some space, or print elsewhere.\n"
    assert (done.returncode, done.stderr) == ((141, "") if reader == "nobody" else (2, said))


def test_log_lines_are_escaped_and_bounded() -> None:
    record = logging.LogRecord("a", logging.WARNING, "", 0, "%s: skipped", ("\x1b[2J" + "x" * 5000,), None)
    line = command.ReadableFormatter(command.LOG_FORMAT).format(record)
    assert line.startswith(r"WARNING: \x1b[2Jxxx") and line.endswith("xxx: skipped") and len(line) < 500


@pytest.mark.parametrize(("last", "status", "reason"), [("return 3", 3, ""), ("1 // 0", 1, "ZeroDivisionError")])
def test_a_thread_that_still_computes_does_not_break_the_end(last: str, status: int, reason: str) -> None:
    """Where the interpreter is taken down, such a thread aborts the process in five of five runs."""
    script = f"""
import atexit, sys, threading, torch
from utils import command

def compute():
    ones = torch.ones(100)
    while True:
        ones + ones

def program():
    command.end_at_once()
    threads = [threading.Thread(target=compute, daemon=True) for _ in range(3)]
    [thread.start() for thread in threads]
    atexit.register(lambda: print("tidied up"))
    sys.stdout.write("said, ")
    {last}

sys.exit(command.run(program))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (status, "said, tidied up\n")
    last_words = done.stderr.splitlines()[-1:]
    assert [line.partition(":")[0] for line in last_words] == ([reason] if reason else [])
