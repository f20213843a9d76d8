"""Many videos into one flat folder, by one process or by many, in one run or in several.

Beside the folder `F` stands `F.run` with the records (pipeline/vbench/records.py). The first process looks once which
files are missing, and each makes its share of those; a file gets its name when it is whole, so what is there is done.
What a video looks like follows from its job and the settings alone, not from the process that makes it or from what was
there before. Several machines need a shared folder. This file does not know where the jobs come from.
"""

from __future__ import annotations

import json
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import groupby
from pathlib import Path

import torch

from pipeline.assembly import Pipeline
from pipeline.config.config import InferenceConfig
from pipeline.config.jobs import VideoJob
from pipeline.planning.memory_advice import memory_explained
from pipeline.runtime.loading import check_before_loading, require_files
from pipeline.runtime.together import joined, rank_device
from pipeline.vbench.records import Records, now
from pipeline.video_files import write_videos
from utils.distributed import World
from utils.errors import InputError
from utils.ffmpeg import check_codec
from utils.files import create_partial, ensure_writable_folder, remove_partial, remove_stale_partials
from utils.lock import RunLock

THREADS = 4  # of each process; one number for all machines, since a CPU's sums depend on it

Batch = tuple[VideoJob, ...]


@dataclass(frozen=True)
class Progress:
    """How far all processes are: `done` of `total` videos are there, `made` of them in the last `seconds`."""

    done: int
    total: int
    made: int
    seconds: float

    def line(self) -> str:
        """For people: how many, and the time left at the pace so far."""
        if self.done >= self.total:
            return f"{self.done} of {self.total} videos, all done"
        if not self.made:
            return f"{self.done} of {self.total} videos"
        left = timedelta(seconds=round((self.total - self.done) * self.seconds / self.made))
        return f"{self.done} of {self.total} videos, {self.made / self.seconds * 3600:.0f} an hour, {left} left"


@dataclass(frozen=True)
class Outcome:
    """What this process made, and how much of the whole is there now; others may still be at work."""

    made: int
    done: int
    total: int


@dataclass(frozen=True)
class Plan:
    """What the first process decided for all: the run's name, and the numbers of the batches to be made."""

    run: str
    missing: tuple[int, ...]

    def to_text(self) -> str:
        return json.dumps({"run": self.run, "missing": self.missing})

    @classmethod
    def from_text(cls, text: str) -> Plan:
        content = json.loads(text)
        return cls(str(content["run"]), tuple(content["missing"]))


def batches(jobs: Sequence[VideoJob], size: int) -> list[Batch]:
    """Jobs of one prompt, up to `size` together, always the same ones: a batch may share what it observes."""
    prompts = [tuple(group) for _, group in groupby(jobs, lambda job: job.prompt_index)]
    return [group[first : first + size] for group in prompts for first in range(0, len(group), size)]


def sample(
    config: InferenceConfig,
    jobs: Sequence[VideoJob],
    world: World,
    report: Callable[[Progress], None],
    threads: int = THREADS,
) -> Outcome:
    """Make this process's share of the files of `jobs` that are missing.

    `report` hears of all processes' progress after every batch of this one. Raises InputError for what the user must
    mend: settings other than those the folder was begun with, another run in it, a full disk, missing weights.
    """
    forcing = config.dummy_forcing
    if forcing.enabled and forcing.speed is not None:
        raise InputError(
            f"dummy_forcing.{forcing.cost_key}: {forcing.speed:g} pixel frames a second are measured by "
            "every process for itself, and these videos must not depend on that; use window, full or a retention"
        )
    if threads < 1:
        raise InputError(f"--threads: must be 1 or more, got {threads}")
    ranks = team_size(config, world)
    config = replace(config, save_metadata=False)  # VBench's folder holds nothing but videos
    device = rank_device(config, world)
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    records = Records(Path(config.output_folder))
    todo = batches(jobs, config.samples_per_batch)
    busy = (
        f"output_folder: another run works in {config.output_folder}. Wait until it has ended, stop it, or choose "
        "another folder."
    )
    with RunLock(records.lock, busy) as lock:
        plan = Plan.from_text(world.agree(lambda: _prepare(config, todo, records, lock, device, threads).to_text()))
        if world.rank:
            records.require_run(plan.run)
            lock.join(world.rank)
        team = World(world.rank // ranks, world.size // ranks)
        mine = [todo[plan.missing[item]] for item in team.share(len(plan.missing))]
        log = records.log(world.rank)
        about = {"host": platform.node(), "pid": os.getpid(), "world_size": world.size, "device": str(device)}
        log.add("begin", run=plan.run, threads=threads, batches=len(mine), **about)
        explained = memory_explained(config, device, config.samples_per_batch, ranks)
        with explained, joined(world, device, ranks) as exchange:
            if mine:
                prompts = [batch[0].prompts[0] for batch in mine]
                size = config.samples_per_batch
                pipeline = Pipeline.from_config(config, prompts=prompts, device=device, batch=size, exchange=exchange)
                if pipeline.follows:
                    pipeline.follow()
                else:
                    _make(pipeline, jobs, mine, lambda event: log.add("video", **event), report)
                    pipeline.close()
        log.add("end", run=plan.run)
    leads = world.rank % ranks == 0
    return Outcome(sum(map(len, mine)) * leads, _count(jobs), len(jobs))


def team_size(config: InferenceConfig, world: World) -> int:
    """The processes that make a video together. Raises InputError if not all of them have a place in a team."""
    if config.parallel is None:
        return 1
    ranks = config.ranks or world.size
    if world.size % ranks:
        raise InputError(
            f"parallel: {config.parallel} makes teams of {ranks} processes, and there are {world.size}; use a multiple "
            f"of {ranks}"
        )
    return ranks


def _prepare(
    config: InferenceConfig, todo: Sequence[Batch], records: Records, lock: RunLock, device: torch.device, threads: int
) -> Plan:
    """Take the folder, see that the run can go on in it, and find out what is missing. For the first process."""
    folder = Path(config.output_folder)
    ensure_writable_folder(folder, "output_folder")
    ensure_writable_folder(records.folder, "output_folder")
    lock.begin(f"process {os.getpid()} on {platform.node()}, begun {now()}")
    remove_stale_partials(folder)
    remove_stale_partials(records.folder)
    jobs = [job for batch in todo for job in batch]
    require_flat_folder(folder)
    require_names_apart(jobs, ignores_case(folder))
    there = set() if config.overwrite else set(os.listdir(folder))
    missing = tuple(i for i, batch in enumerate(todo) if any(job.path.name not in there for job in batch))
    if missing:
        require_files(config)
        check_before_loading(config, device)
        check_codec(config.video_codec)
    plan = Plan(uuid.uuid4().hex, missing)
    records.begin(config, jobs, plan.run, device, threads)
    return plan


def require_flat_folder(folder: Path) -> None:
    """Raises InputError if it holds anything but mp4 files (hidden ones aside)."""
    others = sorted(
        entry.name
        for entry in os.scandir(folder)
        if not entry.name.startswith(".") and (entry.is_dir() or not entry.name.endswith(".mp4"))
    )
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise InputError(
            f"output_folder: {folder} holds {others[0]!r}{more}; VBench wants a folder of mp4 files alone, and takes "
            "the extension of all from the first entry it sees. Move them away or choose another folder."
        )


def ignores_case(folder: Path) -> bool:
    """Whether the file system takes names that differ in case for the same; found out by making a file."""
    # A partial file's name: the next run removes it should this one be killed here.
    probe = create_partial(folder / f"case-Test-{uuid.uuid4().hex[:8]}.mp4")
    try:
        return probe.with_name(probe.name.upper()).exists()
    finally:
        remove_partial(probe)


def require_names_apart(jobs: Sequence[VideoJob], case_ignored: bool) -> None:
    """Raises InputError if two jobs have one file, to a file system that ignores case if `case_ignored`."""
    seen: dict[str, str] = {}
    for job in jobs:
        name = job.path.name
        first = seen.setdefault(name.casefold() if case_ignored else name, name)
        if first != name:
            raise InputError(
                f"output_folder: {first!r} and {name!r} are one file on the file system of {job.path.parent}, which "
                "ignores case; choose a folder on one that does not"
            )


def _make(
    pipeline: Pipeline,
    jobs: Sequence[VideoJob],
    mine: Sequence[Batch],
    on_video: Callable[[Mapping[str, object]], None],
    report: Callable[[Progress], None],
) -> None:
    before, begin = _count(jobs), time.monotonic()
    for batch, timings in _written(pipeline, mine):
        for job in batch:
            on_video({"file": job.path.name, "noise_seed": job.noise_seed, "timings": timings})
        done = _count(jobs)
        report(Progress(done, len(jobs), done - before, time.monotonic() - begin))


def _count(jobs: Sequence[VideoJob]) -> int:
    """How many of the videos are there; the folder is listed once, since it may be a slow one."""
    there = set(os.listdir(jobs[0].path.parent))
    return sum(job.path.name in there for job in jobs)


def _written(pipeline: Pipeline, mine: Sequence[Batch]) -> Iterator[tuple[Batch, dict[str, object]]]:
    for batch in mine:
        profile = write_videos(pipeline, batch, lambda _: None)
        yield batch, profile.as_dict()
