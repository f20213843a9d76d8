"""Sampling into a folder (sample_vbench.py, pipeline/vbench/sampling.py, pipeline/vbench/records.py): killed, resumed,
refused."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sample_vbench
from pipeline.config.config import load_config
from pipeline.runtime.together import rank_device
from pipeline.vbench.prompts import read_vbench_jobs
from pipeline.vbench.records import Records
from pipeline.vbench.sampling import Progress, batches, ignores_case, require_names_apart, sample
from tests.small_checkpoints import SmallCheckpoints
from utils.distributed import World
from utils.errors import InputError
from utils.lock import RunLock
from utils.seed import video_seed

ROOT = Path(__file__).parents[1]
CONFIG = """
generator_ckpt: Self-Forcing/checkpoints/self_forcing_dmd.pt
use_ema: true
resolution: [16, 32]
num_output_frames: 3
num_frame_per_block: 1
dummy_forcing: {ar_start: 1, num_dummy: 6}
"""
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals, limits and locks of POSIX")
Contents = dict[str, bytes]


@pytest.fixture(scope="module")
def checkpoints(checkpoints: SmallCheckpoints) -> Path:
    return checkpoints.root


class Case:
    """A list of prompts and a configuration in a folder of their own."""

    def __init__(self, root: Path, checkpoints: Path, prompts: int) -> None:
        self.root, self.checkpoints = root, checkpoints
        self.config = root / "config.yaml"
        self.config.write_text(CONFIG)
        text = "".join(f"a red cat, number {i}\n" for i in range(prompts))
        (root / "prompts.txt").write_text(text)

    def arguments(self, folder: str, *more: str) -> list[str]:
        places = [f"model_root={self.checkpoints}", f"data_path={self.root}/prompts.txt"]
        options = ["--config_path", str(self.config), "--threads", "1", *places]
        return [*options, f"output_folder={self.root / folder}", *more]

    def run(self, folder: str, *more: str) -> int:
        return sample_vbench.main(self.arguments(folder, *more))

    def start(self, processes: int, folder: str, *more: str) -> subprocess.Popen[str]:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [*torchrun, "sample_vbench.py", *self.arguments(folder, *more)]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def contents(self, folder: str) -> Contents:
        return {path.name: path.read_bytes() for path in (self.root / folder).iterdir()}

    def records(self, folder: str) -> Contents:
        return {name: data for name, data in self.contents(f"{folder}.run").items() if not name.startswith("lock")}

    def events(self, folder: str, event: str, rank: int = 0) -> list[dict[str, object]]:
        lines = (self.root / f"{folder}.run" / f"log.rank-{rank}.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["event"] == event]


def _output(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=180)
    return output


def _wait_for(process: subprocess.Popen[str], folder: Path, count: int) -> None:
    end = time.monotonic() + 120
    while not folder.is_dir() or len(list(folder.glob("a red*.mp4"))) < count:
        assert process.poll() is None and time.monotonic() < end, _output(process)
        time.sleep(0.02)


@posix
def test_a_killed_run_resumed_equals_an_undisturbed_one(tmp_path: Path, checkpoints: Path) -> None:
    case = Case(tmp_path, checkpoints, 20)
    killed = case.start(2, "b")
    _wait_for(killed, tmp_path / "b", 4)
    [begun] = case.events("b", "begin", rank=1)
    os.kill(int(str(begun["pid"])), signal.SIGKILL)
    assert "SIGKILL" in _output(killed)
    assert killed.returncode != 0
    survivors = {name: data for name, data in case.contents("b").items() if not name.startswith(".")}
    assert 4 <= len(survivors) < 20

    resumed = case.start(2, "b")
    output = _output(resumed)
    assert resumed.returncode == 0, output
    assert "20 of 20 are there" in output and re.search(r"\d+ of 20 videos, \d+ an hour, \d:\d\d:\d\d left", output)
    made = [event["file"] for rank in range(2) for event in case.events("b", "video", rank)]
    assert len(made) == len(set(made)) == 20

    assert case.run("a") == 0
    assert case.contents("b") == case.contents("a")
    assert len(case.contents("a")) == 20
    assert survivors.items() <= case.contents("a").items()

    dates = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "b").iterdir()}
    (tmp_path / "b" / "a red cat, number 7-0.mp4").unlink()
    assert case.run("b") == 0
    assert case.contents("b") == case.contents("a")
    changed = [path.name for path in (tmp_path / "b").iterdir() if path.stat().st_mtime_ns != dates[path.name]]
    assert changed == ["a red cat, number 7-0.mp4"]
    assert case.run("b", "--check") == 0


def test_records_stand_beside_the_folder(tmp_path: Path, checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Case(tmp_path, checkpoints, 2)
    assert case.run("v", "num_samples=2", "seed=5") == 0
    assert sorted(case.contents("v")) == [f"a red cat, number {i}-{s}.mp4" for i in range(2) for s in range(2)]
    lines = [json.loads(line) for line in (tmp_path / "v.run" / "seeds.jsonl").read_text().splitlines()]
    assert lines == [
        {
            "file": f"a red cat, number {i}-{s}.mp4",
            "prompt": f"a red cat, number {i}",
            "seed": 5,
            "prompt_index": i,
            "sample_index": s,
            "noise_seed": video_seed(5, i, s),
        }
        for i in range(2)
        for s in range(2)
    ]
    settings = json.loads((tmp_path / "v.run" / "settings.json").read_text())
    assert (settings["settings"]["seed"], settings["settings"]["--threads"]) == (5, 1)
    assert torch.get_num_threads() == 1
    [begin], [end] = case.events("v", "begin"), case.events("v", "end")
    assert begin["threads"] == 1 and begin["batches"] == 4 and begin["run"] == end["run"] == settings["run"]
    assert capsys.readouterr().out.endswith(
        "4 of 4 videos, all done\nprocess 0 of 1 has made 4 videos; 4 of 4 are there\n"
    )


def test_more_samples_and_prompts_join_the_folder(tmp_path: Path, checkpoints: Path) -> None:
    case = Case(tmp_path, checkpoints, 2)
    assert case.run("v", "inference_iter=1") == 0
    first = case.contents("v")
    assert case.run("v", "num_samples=2") == 0
    assert len(case.contents("v")) == 4 and first.items() <= case.contents("v").items()
    assert case.run("v", "inference_iter=1") == 0  # records of the others are kept
    assert len((tmp_path / "v.run" / "seeds.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["seed=1"], "was begun with other settings: seed 0 -> 1. Use what the videos there were made with"),
        (["--threads", "2"], "was begun with other settings: --threads 1 -> 2"),
        (["samples_per_batch=5"], "was begun with other settings: samples_per_batch 1 -> 5"),
        (["data_path={root}/moved.txt"], "a red cat, number 0-0.mp4 is of another list: prompt_index 0 -> 1"),
    ],
)
def test_what_does_not_fit_the_folder_is_refused(
    tmp_path: Path, checkpoints: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    case = Case(tmp_path, checkpoints, 1)
    assert case.run("v") == 0
    before = case.contents("v"), case.records("v")
    (tmp_path / "moved.txt").write_text("new\na red cat, number 0\n")
    more = [text.format(root=tmp_path) for text in more]
    assert case.run("v", *more) == 2
    assert message in capsys.readouterr().err
    assert (case.contents("v"), case.records("v")) == before
    if "--threads" in more:
        return  # two threads on a busy machine take long
    assert case.run("v", *more, "overwrite=true") == 0
    name = "a red cat, number 0-0.mp4"
    same = case.contents("v")[name] == before[0][name]
    assert same == ("samples_per_batch=5" in more)  # a single sample is the same batch


@posix
def test_two_runs_in_one_folder(tmp_path: Path, checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Case(tmp_path, checkpoints, 1)
    records = Records(tmp_path / "v")
    records.folder.mkdir()
    with RunLock(records.lock, "") as other:
        other.join(1)  # the last process of an earlier run
        assert case.run("v") == 2
        assert "output_folder: another run works in" in capsys.readouterr().err
        assert case.contents("v") == {}
    assert case.run("v") == 0


@posix
def test_a_disk_that_fills_up_loses_nothing(
    tmp_path: Path, checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import resource

    case = Case(tmp_path, checkpoints, 4)
    config = load_config(case.config, case.arguments("v")[4:])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(progress: Progress) -> None:
        if progress.done == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))

    try:
        with pytest.raises(InputError, match="no space left"):
            sample(config, read_vbench_jobs(config), World(), fill, threads=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(case.contents("v")) == 2
    assert case.run("v", "--check") == 1
    assert "2 missing; run again to make them" in capsys.readouterr().out
    assert case.run("v") == 0
    assert case.run("w") == 0
    assert case.contents("v") == case.contents("w")


def test_a_batch_that_is_not_complete_is_made_again_as_a_whole(tmp_path: Path, checkpoints: Path) -> None:
    case = Case(tmp_path, checkpoints, 1)
    together = ["num_samples=3", "samples_per_batch=2"]
    assert case.run("v", *together) == 0
    whole = case.contents("v")
    (tmp_path / "v" / "a red cat, number 0-1.mp4").unlink()
    assert case.run("v", *together) == 0
    assert case.contents("v") == whole
    assert [event["batches"] for event in case.events("v", "begin")] == [2, 1]


def test_batches_are_always_the_same(tmp_path: Path, checkpoints: Path) -> None:
    case = Case(tmp_path, checkpoints, 3)
    config = load_config(case.config, case.arguments("v", "num_samples=5")[4:])
    jobs = read_vbench_jobs(config)
    found = [[(job.prompt_index, job.sample_index) for job in batch] for batch in batches(jobs, 2)]
    assert found == [[(p, s) for s in group] for p in range(3) for group in ([0, 1], [2, 3], [4])]
    assert batches(jobs, 1) == [(job,) for job in jobs]


def test_other_files_in_the_folder_are_refused(
    tmp_path: Path, checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(tmp_path, checkpoints, 1)
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "a.json").write_text("{}")
    assert case.run("v") == 2
    assert "holds 'a.json'; VBench wants a folder of mp4 files alone" in capsys.readouterr().err


def test_missing_weights_are_named_before_anything_is_written(
    tmp_path: Path, checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(tmp_path, checkpoints, 1)
    assert case.run("v", "generator_ckpt=none.pt") == 2
    assert "none.pt does not exist" in capsys.readouterr().err
    assert case.contents("v") == {}
    assert not (tmp_path / "v.run" / "settings.json").exists()
    assert case.run("v", "--threads", "0") == 2
    assert "--threads: must be 1 or more" in capsys.readouterr().err


def test_names_that_differ_in_case_alone(tmp_path: Path, checkpoints: Path) -> None:
    case = Case(tmp_path, checkpoints, 1)
    (tmp_path / "prompts.txt").write_text("A fantasy landscape\na fantasy landscape\n")
    jobs = read_vbench_jobs(load_config(case.config, case.arguments("v")[4:]))
    require_names_apart(jobs, case_ignored=False)
    with pytest.raises(InputError, match=r"'A fantasy landscape-0\.mp4' and 'a fantasy landscape-0\.mp4' are one"):
        require_names_apart(jobs, case_ignored=True)
    (tmp_path / "UPPER").touch()
    assert ignores_case(tmp_path) == (tmp_path / "upper").exists()
    assert sorted(os.listdir(tmp_path)) == ["UPPER", "config.yaml", "prompts.txt"]


def test_progress_says_how_long_it_will_take() -> None:
    assert Progress(10, 40, 5, 60.0).line() == "10 of 40 videos, 300 an hour, 0:06:00 left"
    assert Progress(10, 40, 0, 60.0).line() == "10 of 40 videos"
    assert Progress(40, 40, 5, 60.0).line() == "40 of 40 videos, all done"


def test_each_process_has_a_gpu_of_its_own(tmp_path: Path, checkpoints: Path) -> None:
    case = Case(tmp_path, checkpoints, 1)
    config = load_config(case.config, case.arguments("v", "device=cpu")[4:])
    assert rank_device(config, World(5, 8, 1, 4)) == torch.device("cpu")
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        config = load_config(case.config, case.arguments("v", "device=cuda")[4:])
        devices = [rank_device(config, World(rank, count, rank, count)) for rank in range(count)]
        assert devices == [torch.device("cuda", rank) for rank in range(count)]
        with pytest.raises(InputError, match=f"use --nproc_per_node={count}"):
            rank_device(config, World(0, count + 1, 0, count + 1))


@posix
def test_a_polite_kill_leaves_whole_videos_alone(
    tmp_path: Path, checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(tmp_path, checkpoints, 30)
    command = [sys.executable, "sample_vbench.py", *case.arguments("v")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    _wait_for(process, tmp_path / "v", 2)
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    assert "interrupted" in _output(process)
    assert process.returncode == 130
    names = [name for name in case.contents("v") if not name.startswith(".")]
    assert 2 <= len(names) < 30
    assert case.run("v", "--check") == 1
    output = capsys.readouterr().out
    assert f"{len(names)} of 30 videos are there and whole" in output and "broken" not in output
