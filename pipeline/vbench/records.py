"""The records beside a folder of videos: what each was made from, what all were made with, and what happened when.

For the folder `F` they lie in `F.run`: `seeds.jsonl` with a line for each video, `settings.json`, `log.rank-N.jsonl` of
each process, and the lock. Both of the first are written before the first video, since all follows from the jobs; a run
that does not fit them is refused before it touches anything. This file makes no videos.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from pipeline.config.config import InferenceConfig, as_dict
from pipeline.config.jobs import NOT_OF_THE_VIDEO, WITH_WHAT_MEMORY, VideoJob
from utils.errors import InputError
from utils.files import write_atomic, write_error
from utils.profiler import device_name
from utils.user_paths import exists, read_json, read_text

logger = logging.getLogger(__name__)

# They can change bits, not what is seen; another machine may need others.
_OF_THE_MACHINE = ("attention", "engine", "compile_cache", "overlap", *WITH_WHAT_MEMORY)


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Log:
    """A file to which one process adds a line of JSON for whatever happens."""

    path: Path

    def add(self, event: str, **fields: object) -> None:
        """Raises InputError if the disk is full."""
        line = json.dumps({"time": now(), "event": event, **fields}, ensure_ascii=False)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise write_error(self.path, error) from error


class Records:
    """The records of the folder `videos`."""

    def __init__(self, videos: Path) -> None:
        self._videos = videos
        whole = videos.resolve()  # all names of a folder lead to the same records
        self.folder = whole.with_name(f"{whole.name}.run")
        self.lock = self.folder / "lock"
        self.seeds = self.folder / "seeds.jsonl"
        self.settings = self.folder / "settings.json"

    def log(self, rank: int) -> Log:
        return Log(self.folder / f"log.rank-{rank}.jsonl")

    def _marker(self, run: str) -> Path:
        """A name that no machine can have looked up, and remembered as missing, before the run began."""
        return self.folder / f"run.{run}"

    def require_run(self, run: str) -> None:
        """Raises InputError if this process does not see the records that the first process wrote for `run`."""
        if not self._marker(run).exists():
            raise InputError(
                f"output_folder: {platform.node()} does not see in {self.folder} what the first process wrote there; "
                "several machines need an output_folder on a disk that they share"
            )

    def begin(
        self, config: InferenceConfig, jobs: Sequence[VideoJob], run: str, device: torch.device, threads: int
    ) -> None:
        """Write `seeds.jsonl` and `settings.json` of a run that makes `jobs`; with `overwrite`, delete their files.

        Raises InputError, and changes nothing, if files are there that were made with other settings, prompts or seeds.
        """
        settings, machine = _settings(config, threads), _machine(config, device)
        lines = {job.path.name: _seed_line(config, job) for job in jobs}
        if config.overwrite:
            for name in lines:
                (self._videos / name).unlink(missing_ok=True)
        there = {name for name in os.listdir(self._videos) if name.endswith(".mp4") and not name.startswith(".")}
        old_lines = {str(line["file"]): line for line in _read_jsonl(self.seeds) if line["file"] in there}
        if there:
            self._require_same(settings, machine, lines, old_lines)
            unknown = len(there - old_lines.keys())
            if unknown:
                logger.warning("%s: %d videos are there of which %s says nothing", self._videos, unknown, self.seeds)
        for marker in self.folder.glob(self._marker("*").name):
            marker.unlink()
        content = {"run": run, "begun": now(), "settings": settings, "machine": machine, "prompts": _digests(config)}
        write_atomic(
            self.seeds, "".join(f"{_dump(line)}\n" for line in {**lines, **_others(old_lines, lines)}.values())
        )
        write_atomic(self.settings, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        write_atomic(self._marker(run), f"{now()}\n")

    def _require_same(
        self,
        settings: Mapping[str, object],
        machine: Mapping[str, object],
        lines: Mapping[str, Mapping[str, object]],
        old_lines: Mapping[str, Mapping[str, object]],
    ) -> None:
        record = _read_json(self.settings)
        remedy = (
            "Use what the videos there were made with, another output_folder, or overwrite=true, which deletes them "
            "and begins anew."
        )
        changed = _differences(record.get("settings", {}), settings)
        if changed:
            raise InputError(f"output_folder: {self._videos} was begun with other settings: {changed}. {remedy}")
        for name, line in lines.items():
            if name in old_lines and (changed := _differences(old_lines[name], line)):
                raise InputError(f"output_folder: {self._videos / name} is of another list: {changed}. {remedy}")
        moved = _differences(record.get("machine", {}), machine)
        if moved:
            logger.warning("%s: begun on another machine, so that bits may differ: %s", self._videos, moved)


def _settings(config: InferenceConfig, threads: int) -> dict[str, object]:
    """All that decides, with a job, what its video looks like."""
    return {
        **{key: value for key, value in as_dict(config).items() if key not in NOT_OF_THE_VIDEO},
        "--threads": threads,
    }


def _machine(config: InferenceConfig, device: torch.device) -> dict[str, object]:
    own = {key: value for key, value in as_dict(config).items() if key in _OF_THE_MACHINE}
    return {**own, "device": device_name(device), "torch": torch.__version__}


def _seed_line(config: InferenceConfig, job: VideoJob) -> dict[str, object]:
    return {
        "file": job.path.name,
        "prompt": job.prompts[0],
        "seed": config.seed,
        "prompt_index": job.prompt_index,
        "sample_index": job.sample_index,
        "noise_seed": job.noise_seed,
    }


def _digests(config: InferenceConfig) -> dict[str, str]:
    paths = [path for path in (config.data_path, config.extended_prompt_path) if path is not None]
    return {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths}


def _others(old: Mapping[str, dict[str, object]], new: Iterable[str]) -> dict[str, dict[str, object]]:
    return {name: line for name, line in old.items() if name not in new}


def _differences(old: Mapping[str, object], new: Mapping[str, object]) -> str:
    """Values that differ, among those that both have: a record of an earlier version has fewer."""
    return ", ".join(f"{key} {old[key]!r} -> {new[key]!r}" for key in new if key in old and old[key] != new[key])


def _dump(line: Mapping[str, object]) -> str:
    return json.dumps(line, ensure_ascii=False)


def _read_json(path: Path) -> dict[str, dict[str, object]]:
    if not exists(path, "output_folder"):
        return {}
    content = read_json(path, "output_folder", "record")
    if not isinstance(content, dict) or not all(isinstance(section, (dict, str)) for section in content.values()):
        raise _unreadable(path, "it has no sections")
    return content


def _read_jsonl(path: Path) -> list[dict[str, object]]:
    if not exists(path, "output_folder"):
        return []
    try:
        lines = [json.loads(line) for line in read_text(path, "output_folder", "record").splitlines()]
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, str(error)) from error
    if not all(isinstance(line, dict) and "file" in line for line in lines):
        raise _unreadable(path, "a line names no file")
    return lines


def _unreadable(path: Path, reason: str) -> InputError:
    return InputError(f"{path}: is not what this program writes there ({reason}). Restore the file, or delete it.")
