"""The studio as a process: how it begins, what keeps it from that, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline import Pipeline
from studio.__main__ import main, parse_arguments, settings_from
from tests.studio_server import CONFIG, ROOT, Studio, running, until
from utils.errors import InputError
from utils.lock import RunLock

FILES = [f"model_root={ROOT / 'checkpoints'}", f"data_path={ROOT / 'prompts' / 'shapes_studio.txt'}"]


def arguments(folder: Path, *more: str) -> list[str]:
    return ["--config_path", str(CONFIG), "--port", "0", *more, *FILES, "resolution=[32,48]", f"output_folder={folder}"]


@contextmanager
def process(folder: Path) -> Iterator[tuple[subprocess.Popen[str], Studio]]:
    """A studio of its own process, and what talks to it."""
    command = [sys.executable, "-m", "studio", *arguments(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as it:
        assert it.stdout is not None
        try:
            line = it.stdout.readline()
            found = re.search(r"http://127.0.0.1:([0-9]+)/", line)
            assert found is not None, line + it.stdout.read()
            yield it, Studio(None, int(found[1]), None)  # type: ignore[arg-type]
        finally:
            it.kill()


def is_free(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return True
    return False


def test_it_ends_in_order_and_a_kill_loses_nothing(shapes_pipeline: Pipeline, tmp_path: Path) -> None:
    with process(tmp_path / "a") as (one, first), process(tmp_path / "b") as (other, second):
        assert first.fetch("/healthz") == (200, b"ok\n") and first.fetch("/readyz")[0] in (200, 503)
        with first.visit() as visitor, second.visit() as doomed:
            for each in (visitor, doomed):  # in whose time the model is loaded
                each.wait_for_frames(21)
            asked = time.monotonic()
            one.send_signal(signal.SIGTERM)
            until(lambda: is_free(first.port), "the port")
            assert time.monotonic() - asked < 5
            other.kill()
            assert one.wait(30) == 0
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert len(list((folder / "takes").iterdir())) == (folder.name == "b")
    with running(shapes_pipeline, tmp_path / "b"):
        until(lambda: not list((tmp_path / "b" / "takes").iterdir()), "the save of what was left")
    for folder in (tmp_path / "a", tmp_path / "b"):
        saved = sorted(path.suffix for path in (folder / "saved").iterdir())
        assert saved == [".jsonl", ".mp4", ".yaml"]


def test_a_port_in_use_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main([*arguments(tmp_path)[:2], "--port", str(port), *FILES, f"output_folder={tmp_path}"]) == 2
    assert f"error: port: {port} on 127.0.0.1 cannot be used (Address already in use)" in capsys.readouterr().err


def test_two_studios_cannot_have_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLock(tmp_path / ".studio.lock", "") as lock:
        lock.begin("process 7")
        assert main(arguments(tmp_path)) == 2
    error = capsys.readouterr().err
    assert f"error: output_folder: {tmp_path} is in use by another studio" in error and "process 7" in error


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--config_path", "nowhere.yaml"], "nowhere.yaml: no such configuration file"),
        (["--port", "99999"], "port: must be 65535 or less"),
        (["--host", "no.such.host.invalid"], "host: no.such.host.invalid is no address"),
        (["--token", "short"], "token: must be 8 to 200"),
        (["parallel=heads:2"], "parallel: heads:2 is for 2 processes, and there is 1; use torchrun"),
        (["seed=x"], "seed: expected an integer"),
        (["data_path=nowhere.txt"], "data_path: nowhere.txt: there is no such"),
        (["model_name=nowhere"], "model_name"),
        (["--calibration", "nowhere"], "--calibration: nowhere: there is no such calibration"),
        (["--calibration", "README.md"], "--calibration: "),
        (["output_folder=/proc/x"], "output_folder: "),
        (["model_kwargs.local_attn_size=-1", "rope=absolute"], "frames: a session without end needs memory"),
    ],
)
def test_what_keeps_it_from_beginning_is_told(
    given: list[str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(tmp_path), *given]) == 2
    assert said in capfd.readouterr().err


def test_other_hosts_have_a_token() -> None:
    assert settings_from(parse_arguments(["--config_path", "x"])).token is None
    made = settings_from(parse_arguments(["--config_path", "x", "--host", "0.0.0.0"])).token
    assert made is not None and len(made) >= 32
    with pytest.raises(InputError):
        settings_from(parse_arguments(["--config_path", "x", "--allow_origin", "x"]))
