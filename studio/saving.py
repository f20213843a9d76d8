"""What Save leaves: the video as it was seen, and the storyboard and settings that make it again.

`NAME.mp4`, `NAME.jsonl` and `NAME.yaml`, the mp4 last. `python interactive_inference.py --config_path NAME.yaml` makes
the same video again; byte for byte on the same machine, by as many processes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import yaml

from pipeline import Pipeline
from pipeline.config.config import InferenceConfig, as_dict
from pipeline.repeating import config_to_repeat
from studio.take import Recorded
from utils.errors import InputError
from utils.files import write_atomic
from utils.video import VideoWriter

NAME = re.compile(r"studio-[0-9]{8}-[0-9]{6}-[0-9a-f]{6}-[0-9]{1,9}")
_LOOK_AHEAD = 20  # blocks
KINDS = {"mp4": "video/mp4", "jsonl": "application/jsonl", "yaml": "application/yaml"}


@dataclass(frozen=True)
class Saved:
    """The files of a save, and how long the video is in pixel frames and in latent frames."""

    name: str
    frames: int
    latent_frames: int
    command: str

    def as_event(self) -> dict[str, object]:
        files = {kind: f"/v1/saved/{self.name}.{kind}" for kind in KINDS}
        return {"name": self.name, "frames": self.frames, "command": self.command, "files": files}


def write_settings(pipeline: Pipeline, recorded: Recorded, folder: Path) -> Path:
    """The storyboard and the YAML; returns the latter. Raises InputError for a video too short to be made again."""
    if not recorded.blocks:
        raise InputError("save: there is nothing yet; wait for the first block")
    config = _config(pipeline, recorded)
    board, settings = (folder / f"{recorded.name}.{kind}" for kind in ("jsonl", "yaml"))
    scenes = recorded.scenes
    line = {"prompts": [scene.prompt for scene in scenes], "switch_frame_indices": [s.start_frame for s in scenes[1:]]}
    write_atomic(board, json.dumps(line) + "\n")
    of_the_run: dict[str, object] = {
        **{"data_path": str(board), "output_folder": str(folder / "again"), "extended_prompt_path": None},
        **{"inference_iter": -1, "num_samples": 1, "switch_frame_indices": [], "start_from": None},
    }
    content = yaml.safe_dump({**as_dict(config), **of_the_run}, sort_keys=False, allow_unicode=True)
    write_atomic(settings, f"# {_command(pipeline, settings)}\n{content}")
    return settings


def _command(pipeline: Pipeline, settings: Path) -> str:
    many = pipeline.processes > 1
    launcher = f"torchrun --nproc_per_node={pipeline.processes}" if many else "python"
    return f"{launcher} interactive_inference.py --config_path {settings}"


def _config(pipeline: Pipeline, recorded: Recorded) -> InferenceConfig:
    """The settings that make the take again. Raises InputError, with the length from which on there are any."""
    notes, overrides = recorded.notes, (*recorded.notes.overrides, "stream_output=false")
    first: InputError | None = None
    for more in range(_LOOK_AHEAD):
        frames = (recorded.blocks + more) * notes.block_latents
        try:
            config = config_to_repeat(pipeline, seed=notes.seed, frames=frames, overrides=overrides)
        except InputError as error:
            first = first or error
            continue
        if not more:
            return config
        seconds = pipeline.pixel_frames(frames) / config.fps
        raise InputError(
            f"save: with this policy a video can be made again from {seconds:.1f} s on; go on a little, and save then"
        ) from first
    assert first is not None
    raise first


def write_save(pipeline: Pipeline, recorded: Recorded, folder: Path, progress: Callable[[int], None]) -> Saved:
    """All files of a take; `progress` hears how many frames are written. Raises InputError as `write_settings`, and if
    the disk is full."""
    settings = write_settings(pipeline, recorded, folder)
    write_video(pipeline, recorded, folder, progress)
    return Saved(recorded.name, recorded.frames, recorded.latent_frames, _command(pipeline, settings))


def write_video(pipeline: Pipeline, recorded: Recorded, folder: Path, progress: Callable[[int], None]) -> None:
    """The mp4 alone, as a script writes it."""
    config = pipeline.config
    height, width = config.pixel_size
    path = folder / f"{recorded.name}.mp4"
    frames, done = recorded.read(), 0
    with VideoWriter(path, width, height, config.fps, config.video_crf, codec=config.video_codec) as writer:
        while batch := list(islice(frames, recorded.notes.block_frames)):
            writer.write(np.stack(batch))
            done += len(batch)
            progress(done)
