"""Processes that share work (utils/distributed.py), and the lock that several may hold (utils/lock.py)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.distributed import World
from utils.errors import InputError
from utils.lock import RunLock

ROOT = Path(__file__).parents[1]
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
posix = pytest.mark.skipif(sys.platform == "win32", reason="no such locks on Windows")


def test_the_environment_says_who_a_process_is() -> None:
    assert World.from_environment({}) == World(0, 1, 0, 1)
    assert World.from_environment(TORCHRUN) == World(rank=3, size=4, local_rank=1, local_size=2)


@pytest.mark.parametrize("name", sorted(TORCHRUN))
def test_half_an_environment_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"^{name}: not set in the environment, but RANK or WORLD_SIZE is"):
        World.from_environment({key: value for key, value in TORCHRUN.items() if key != name})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "4"}, "RANK: 4 of WORLD_SIZE 4"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK 2 of LOCAL_WORLD_SIZE 2"),
        ({"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE 5"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE: 'four' in the environment is no number"),
        ({"RANK": "-1"}, "RANK: '-1' in the environment is no number"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT: 'x' in the environment is no number"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        World.from_environment({**TORCHRUN, **change})


@given(st.integers(0, 200), st.integers(1, 40))
def test_shares_are_all_items_once_and_even(count: int, size: int) -> None:
    shares = [World(rank, size, rank, size).share(count) for rank in range(size)]
    assert [item for share in shares for item in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def _agree(monkeypatch: pytest.MonkeyPatch, decide: Callable[[int], str], size: int = 3) -> list[str | InputError]:
    """What each of `size` processes gets; threads here, which talk through the same store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))

    def one(rank: int) -> str | InputError:
        try:
            return World(rank, size, rank, size).agree(lambda: decide(rank), timeout_s=30)
        except InputError as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def test_the_first_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _agree(monkeypatch, lambda rank: f"of {rank}: ö") == ["of 0: ö"] * 3


def test_what_the_first_refuses_all_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(rank: int) -> str:
        raise InputError("output_folder: no")

    assert [str(answer) for answer in _agree(monkeypatch, refuse)] == ["output_folder: no"] * 3
    with pytest.raises(InputError, match="output_folder: no"):
        World().agree(lambda: refuse(0))


def test_a_process_that_finds_no_other_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "9")  # nobody listens there
    with pytest.raises(InputError, match=r"process 1 of 2 lost the others at 127\.0\.0\.1:9"):
        World(1, 2, 1, 2).agree(lambda: "", timeout_s=1)


def test_a_run_is_begun_by_one_and_worked_on_by_several(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with RunLock(path, "Busy.") as first, RunLock(path, "Busy.") as other:
        first.begin("the first of them")
        with pytest.raises(InputError, match=r"^Busy\. It is held by the first of them\.$"):
            other.begin("the other")
        with RunLock(path, "Busy.") as member, RunLock(path, "Busy.") as twin:
            member.join(1)
            with pytest.raises(InputError, match="Busy"):
                twin.join(1)
            first.__exit__(None, None, None)
            with pytest.raises(InputError, match="Busy"):
                other.begin("the other")  # process 1 is still at work
        assert first.holder() == ""
        other.begin("the other")
        assert first.holder() == "the other"
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.endswith("holder")] == []


@posix
def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from utils.lock import RunLock\n"
        "lock = RunLock(Path(sys.argv[1]), ''); lock.begin('the other'); print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with RunLock(tmp_path / "lock", "Busy.") as lock:
        with pytest.raises(InputError, match="held by the other"):
            lock.begin("x")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        lock.begin("x")


def test_a_lock_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"lock: cannot be written"):
        RunLock(tmp_path / "file" / "lock", "").begin("x")


LAUNCHED = """
import os, signal, sys, time
from utils.distributed import stop_with_launcher
def end(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGTERM, end)
if sys.argv[1] == "deaf":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
stop_with_launcher(grace_s=0.3)
print("ready", flush=True)
try:
    time.sleep(30)
    print("went on")
except KeyboardInterrupt:
    print("tidied up", flush=True)
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


@posix
@pytest.mark.parametrize(
    ("process", "environment", "said"),
    [
        ("hearing", {"TORCHELASTIC_RUN_ID": "x"}, "tidied up\n"),
        ("deaf", {"TORCHELASTIC_RUN_ID": "x"}, ""),  # busy in a library, say
        ("nobody's", {}, None),
    ],
)
def test_a_process_ends_with_its_launcher(process: str, environment: dict[str, str], said: str | None) -> None:
    """Without torchrun, as after `nohup python sample_vbench.py &` and a logout, it goes on."""
    command = [sys.executable, "-c", LAUNCHER, LAUNCHED, process]
    around = {key: value for key, value in os.environ.items() if key != "TORCHELASTIC_RUN_ID"}
    launcher = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT, env={**around, **environment}
    )
    assert launcher.stdout is not None and launcher.stdout.readline() == "ready\n"
    (launched,) = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(launcher.pid, signal.SIGKILL)
    if said is None:
        time.sleep(1.5)
        os.kill(int(launched), signal.SIGKILL)  # raises if it is gone
        said = ""
    begun = time.monotonic()
    assert launcher.stdout.read() == said  # to its end: no process has it open any more
    assert time.monotonic() - begun < 10
    launcher.wait()
