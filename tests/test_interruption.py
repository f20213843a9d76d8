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
from utils.interrupts import INTERRUPTED
from utils.video import probe

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
PROMPTS = [f"Prompt number {i}." for i in range(6)]
SIZE = ("resolution=[64,96]", "num_output_frames=12")  # about a second a video: time to hit the middle of one
UNPLANNED = ("low_memory=false", "vae_tile=never")  # one way to decode: a second less, which planning them all takes


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_run_that_is_ended_leaves_whole_videos(program: Program, number: signal.Signals) -> None:
    """SIGINT, which ends a run as SIGTERM does, is for tests/test_overlap.py."""
    command = [sys.executable, "inference.py", *program.arguments(*SIZE, *UNPLANNED, prompts=PROMPTS)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    wait_for(lambda: bool(program.mp4s) and bool(program.unfinished), process)
    time.sleep(0.2)  # into the middle of the second video
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


COMMANDS = [f"{name} --config_path a.yaml" for name in ("inference.py", "interactive_inference.py", "sample_vbench.py")]
COMMANDS += [
    "-m pipeline.atlas",
    "-m dummy.compare a b",
    "-m utils.recover a",
    "-m benchmarks.memory",
    "-m shapes.train",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupt_while_modules_are_imported_is_answered_in_one_line(command: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", *command.split()],
        cwd=ROOT,
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    for line in process.stderr:  # modules, as they are imported
        if " torch." in line or " numpy." in line:
            break
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert [line for line in said.splitlines() if "import time:" not in line] == [INTERRUPTED]


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


KILL_AT_EVERY_CHANGE = """
import os, signal, sys
import torch
import inference
from pipeline import assembly
torch.set_num_threads(1)
videos = sys.argv[1]
load = assembly.Pipeline.from_config
loaded = []
def load_once(config, **given):
    loaded[:] = loaded or [load(config, **given)]
    loaded[0].config = config
    return loaded[0]
assembly.Pipeline.from_config = load_once  # loading is not what is tried here

def killed_at(number, arguments):
    seen = [0]
    def hook(event, details):
        if event in ("os.rename", "os.remove") and str(details[0]).startswith(videos):
            seen[0] += 1
            if seen[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
    child = os.fork()
    if child == 0:
        sys.addaudithook(hook)
        os._exit(inference.main(arguments))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

for stream in ("false", "true"):
    arguments = [*sys.argv[2:], f"stream_output={stream}"]
    assert inference.main([*arguments, "overwrite=true"]) == 0
    for number in range(1, 30):
        for name in os.listdir(videos):
            os.unlink(os.path.join(videos, name))
        status = killed_at(number, arguments)
        assert inference.main(arguments) == 0
        print(stream, status, sorted(name.rpartition("-")[2] for name in os.listdir(videos)), flush=True)
        if status == 0:
            break
"""


def test_whenever_it_was_killed_the_next_run_completes_it(program: Program) -> None:
    """The process is killed before each change of a name in turn; then video, JSON and sheet come to be, and no more.

    `stream_output` has the growing file to lose as well.
    """
    tiny = ("resolution=[16,32]", "num_output_frames=3", "contact_sheet=true", "dummy_forcing=off", "inference_iter=1")
    program.videos.mkdir()
    command = [sys.executable, "-c", KILL_AT_EVERY_CHANGE, str(program.videos), *program.arguments(*tiny, *UNPLANNED)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    for stream in ("false", "true"):
        rounds = [line.split(" ", 2) for line in done.stdout.splitlines() if line.startswith(f"{stream} ")]
        assert [status for _, status, _ in rounds] == ["-9"] * (len(rounds) - 1) + ["0"]
        assert {names for _, _, names in rounds} == {"['0.json', '0.mp4', '0.png']"}
        assert len(rounds) >= 5  # the probe of the folder, three names, and the end


def test_a_video_that_was_made_without_gets_its_sheet(program: Program) -> None:
    tiny = ("resolution=[16,32]", "num_output_frames=3", "dummy_forcing=off", "inference_iter=1")
    assert program(*tiny) == 0
    before = program.mp4s
    assert program(*tiny, "contact_sheet=true") == 0
    (sheet,) = program.videos.glob("*.png")
    assert sheet.stat().st_size > 0 and program.mp4s == before
    # Made again without: the old sheet and JSON would tell of another video.
    assert program(*tiny, "overwrite=true", "seed=1", "save_metadata=false") == 0
    assert [path.suffix for path in program.written] == [".mp4"]
    (video,) = program.written
    video.write_bytes(video.read_bytes()[:300])
    assert program(*tiny, "contact_sheet=true") == 2
