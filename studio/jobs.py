"""Videos as jobs, in the form of the OpenAI-compatible video servers: asked for, waited for, fetched.

A job is a JSON file, and a video of its name once it is done; both lie in one folder, and a server that starts goes on
with what is there. Jobs are made one at a time by the same loop as sessions, when no session needs it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from pipeline import Pipeline
from pipeline.config.config import as_dict, load_config
from studio.protocol import Restart, checked_prompt
from studio.settings import KEPT_JOBS, QUEUED_JOBS
from studio.workshop import Workshop
from utils.config import build
from utils.errors import InputError, quoted
from utils.files import remove_stale_partials, write_atomic
from utils.user_paths import read_json
from utils.video import VideoWriter

logger = logging.getLogger(__name__)

ID = re.compile(r"video_[0-9a-f]{24}")


@dataclass(frozen=True)
class JobRequest:
    """What a client asks for; values may be texts, as forms have them. Raises InputError."""

    prompt: str
    model: str | None = None
    seconds: str | int | float | None = None
    size: str | None = None
    seed: str | int | None = None
    policy: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", checked_prompt(self.prompt, "prompt"))


@dataclass(frozen=True)
class Job:
    """One job, as its file has it. Times are seconds since 1970; `frames` are latent ones."""

    id: str
    prompt: str
    seconds: str
    size: str
    model: str
    seed: int
    policy: str
    frames: int
    created_at: int
    status: Literal["queued", "in_progress", "completed", "failed"] = "queued"
    progress: int = 0
    completed_at: int | None = None
    message: str | None = None

    def as_object(self) -> dict[str, object]:
        """As clients get it."""
        fields = {name: value for name, value in asdict(self).items() if name not in ("message", "frames")}
        error = None if self.message is None else {"code": "failed", "message": self.message}
        return {"object": "video", **fields, "expires_at": None, "error": error}


class Jobs:
    """All jobs of a folder."""

    def __init__(self, workshop: Workshop) -> None:
        """Reads what earlier servers have left there."""
        self._workshop = workshop
        self._folder = workshop.folders.jobs
        self._jobs: dict[str, Job] = {}
        self._changed = asyncio.Event()
        remove_stale_partials(self._folder)
        for path in sorted(self._folder.glob("video_*.json")):
            try:
                job = _read(path)
            except InputError as error:
                logger.warning("%s", error)
                continue
            self._jobs[job.id] = replace(job, status="queued", progress=0) if job.status == "in_progress" else job
        self._jobs = {job.id: job for job in sorted(self._jobs.values(), key=lambda job: job.created_at)}

    def add(self, asked: JobRequest) -> Job:
        """Raises InputError for what cannot be made, or if too many wait."""
        if sum(job.status == "queued" for job in self._jobs.values()) >= QUEUED_JOBS:
            raise TooMany(f"jobs: {QUEUED_JOBS} wait already; come back later")
        job = new_job(asked, self._workshop)
        self._keep(job)
        for old in [old for old in self._jobs.values() if old.completed_at is not None][:-KEPT_JOBS]:
            self.remove(old.id)
        self._changed.set()
        return job

    def get(self, name: str) -> Job | None:
        return self._jobs.get(name)

    def newest(self, count: int) -> Sequence[Job]:
        return list(self._jobs.values())[::-1][:count]

    def remove(self, name: str) -> Job | None:
        """Forget a job, and delete its files; one that is being made is given up."""
        job = self._jobs.pop(name, None)
        if job is not None:
            self._path(job, "json").unlink(missing_ok=True)
            self._path(job, "mp4").unlink(missing_ok=True)
        return job

    def content(self, job: Job) -> Path:
        """The finished video."""
        return self._path(job, "mp4")

    async def run(self) -> None:
        """Make one job after the other, as long as anything can be made."""
        while self._workshop.pipeline.fault is None:
            self._changed.clear()
            job = next((job for job in self._jobs.values() if job.status == "queued"), None)
            if job is None:
                await self._changed.wait()
                continue
            await self._make(job)

    async def _make(self, job: Job) -> None:
        try:
            await self._write(job)
            done = replace(self._jobs[job.id], status="completed", progress=100)
        except _Removed:
            self._path(job, "mp4").unlink(missing_ok=True)
            return
        except Exception as error:
            if self._workshop.pipeline.fault is not None:
                return  # the next start makes it
            message = str(error)
            if not isinstance(error, InputError):
                logger.exception("job %s has failed", job.id)
                message = "this job has failed; the server's log says how"
            done = replace(job, status="failed", message=message)
        self._workshop.metrics.jobs.labels(done.status).inc()
        if job.id in self._jobs:
            self._keep(replace(done, completed_at=int(time.time())))

    async def _write(self, job: Job) -> None:
        workshop, config = self._workshop, self._workshop.pipeline.config
        choices = workshop.choices
        choice = choices.changed(choices.first(job.prompt), Restart(seed=job.seed, policy=job.policy))
        overrides, frames = choices.overrides(choice), job.frames
        generator = workshop.generator
        session = await generator.run(
            lambda: workshop.pipeline.session(seed=job.seed, frames=frames, overrides=overrides, live=False), True
        )
        height, width = config.pixel_size
        path = self._path(job, "mp4")
        try:
            await workshop.encode(session, job.prompt)
            writer = VideoWriter(path, width, height, config.fps, config.video_crf, codec=config.video_codec)
            with writer:
                while (block := await generator.run(lambda: next(session, None), True)) is not None:
                    await workshop.picture(partial(writer.write, block.frames))
                    self._advance(job, session.frames_made)
        finally:
            await workshop.shut(session)

    def _advance(self, job: Job, frames: int) -> None:
        if job.id not in self._jobs:
            raise _Removed
        progress = min(99, 100 * frames // job.frames)
        self._keep(replace(job, status="in_progress", progress=progress), on_disk=frames <= job.frames // 2)

    def _keep(self, job: Job, on_disk: bool = True) -> None:
        self._jobs[job.id] = job
        if on_disk:
            write_atomic(self._path(job, "json"), json.dumps(asdict(job), indent=1) + "\n")

    def _path(self, job: Job, kind: str) -> Path:
        return self._folder / f"{job.id}.{kind}"


class TooMany(InputError):
    """Nothing is wrong with what was asked for, but it was too much at once."""


class _Removed(Exception):
    """Somebody has deleted the job that is being made."""


def new_job(asked: JobRequest, workshop: Workshop) -> Job:
    """A job for what was asked, with a block's multiple of frames. Raises InputError for what this server lacks."""
    config = workshop.pipeline.config
    height, width = config.pixel_size
    size, model = f"{width}x{height}", Path(config.model_name).name
    if asked.size not in (None, size):
        raise InputError(f"size: this server makes {size} alone, not {quoted(asked.size or '')}; leave it out")
    if asked.model not in (None, model):
        raise InputError(f"model: this server has {model} alone, not {quoted(asked.model or '')}; leave it out")
    seconds = None if asked.seconds is None else _number("seconds", asked.seconds)
    if seconds is not None and not 0 < seconds <= workshop.settings.job_seconds:
        raise InputError(f"seconds: must be above 0 and at most {workshop.settings.job_seconds}, got {seconds:g}")
    seed = config.seed if asked.seed is None else _number("seed", asked.seed)
    if seed != int(seed):
        raise InputError(f"seed: must be a whole number, got {seed:g}")
    choices = workshop.choices
    choice = choices.changed(choices.first(asked.prompt), Restart(seed=int(seed), policy=asked.policy))
    pipeline = workshop.pipeline
    frames = config.num_output_frames if seconds is None else frames_for(pipeline, seconds)
    load_config(as_dict(config), [*choices.overrides(choice), f"num_output_frames={frames}"])
    length = f"{pipeline.pixel_frames(frames) / config.fps:.4g}"
    made = secrets.token_hex(12), choice.prompt, length, size, model, int(seed), choice.policy, frames, int(time.time())
    return Job(f"video_{made[0]}", *made[1:])


def frames_for(pipeline: Pipeline, seconds: float) -> int:
    """Latent frames, whole blocks, that last so long or a little longer."""
    block = frames = pipeline.config.num_frame_per_block
    while pipeline.pixel_frames(frames) < seconds * pipeline.config.fps:
        frames += block
    return frames


def _number(field: str, value: str | int | float) -> float | int:
    if isinstance(value, str):
        if re.fullmatch(r"[0-9]{1,18}(\.[0-9]{1,9})?", value) is None:
            raise InputError(f"{field}: must be a number, got {quoted(value)}")
        return float(value) if "." in value else int(value)
    if not 0 <= value < 2**63:
        raise InputError(f"{field}: must be from 0 to 2**63 - 1, got {value}")
    return value


def _read(path: Path) -> Job:
    content = read_json(path, "", "job")
    if not isinstance(content, dict) or ID.fullmatch(path.stem) is None or content.get("id") != path.stem:
        raise InputError(f"{path}: is no job; remove it")
    return build(Job, content)
