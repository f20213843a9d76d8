"""A video as it is made, on disk: every frame without loss, and what says how it is made again.

A folder a take: `take.json`, written anew at each prompt, and `frames.bin`, to which frames are appended as pictures,
each after its length. So a server that was killed leaves all but the last block, and nothing of a video is in memory.
"""

from __future__ import annotations

import json
import logging
import shutil
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from studio.pictures import Frame, from_picture, png
from utils.config import build
from utils.errors import InputError
from utils.files import write_atomic, write_error
from utils.user_paths import read_json

logger = logging.getLogger(__name__)

_LENGTH = struct.Struct("!I")


@dataclass(frozen=True)
class Scene:
    """A prompt from a latent frame on."""

    start_frame: int
    prompt: str


@dataclass(frozen=True)
class TakeNotes:
    """What `take.json` says: the name that its files get, and the settings that make it again."""

    name: str
    seed: int
    overrides: tuple[str, ...]
    first_frames: int  # pixel frames of the first block,
    block_frames: int  # of every other one,
    block_latents: int  # and latent frames of each
    scenes: tuple[Scene, ...] = ()


@dataclass(frozen=True)
class Recorded:
    """So much of a take that is whole: blocks, and the scenes that began in them."""

    folder: Path
    notes: TakeNotes
    blocks: int

    @property
    def name(self) -> str:
        """Of its files; a save of more of the same take has another."""
        return f"{self.notes.name}-{self.latent_frames}"

    @property
    def latent_frames(self) -> int:
        return self.blocks * self.notes.block_latents

    @property
    def frames(self) -> int:
        """Pixel frames."""
        return self.notes.first_frames + (self.blocks - 1) * self.notes.block_frames if self.blocks else 0

    @property
    def scenes(self) -> Sequence[Scene]:
        return [scene for scene in self.notes.scenes if scene.start_frame < self.latent_frames]

    def read(self) -> Iterator[Frame]:
        """All frames [H, W, 3], in order. Raises InputError if the file cannot be read."""
        path = self.folder / FRAMES
        try:
            with path.open("rb") as file:
                for _ in range(self.frames):
                    yield from_picture(_next(file) or b"")
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


NOTES, FRAMES = "take.json", "frames.bin"


@dataclass
class Take:
    """The recording of a video under way. `add` and `begin_scene` are for one thread at a time."""

    folder: Path
    notes: TakeNotes
    most_bytes: int
    scenes: list[Scene] = field(default_factory=list)
    blocks: int = 0
    fault: str | None = None
    """Why nothing more is recorded, if that is so."""

    def __post_init__(self) -> None:
        """Raises InputError if the folder cannot be written."""
        self._bytes = 0
        try:
            self.folder.mkdir(parents=True)
            self._file: BinaryIO | None = (self.folder / FRAMES).open("xb")
        except OSError as error:
            raise write_error(self.folder, error) from error
        self._note()

    def begin_scene(self, scene: Scene) -> None:
        """A prompt that takes effect with the block that is added next."""
        if self._file is not None:
            self.scenes.append(scene)
            self._note()

    def add(self, frames: Sequence[Frame]) -> None:
        """The next block. A full disk, or a video as long as may be, ends the recording and not the video."""
        if self._file is None:
            return
        pictures = [png(frame) for frame in frames]
        data = b"".join(_LENGTH.pack(len(picture)) + picture for picture in pictures)
        if self._bytes + len(data) > self.most_bytes:
            self._stop(f"the recording is full ({self.most_bytes / 2**30:g} GiB); a save holds the video up to here")
            return
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            self._stop(f"recording has stopped ({error.strerror or error}); a save holds the video up to here")
            return
        self._bytes += len(data)
        self.blocks += 1

    def recorded(self) -> Recorded:
        """What there is so far; it may be read while more is added."""
        return Recorded(self.folder, self._full_notes(), self.blocks)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _stop(self, fault: str) -> None:
        logger.warning("%s: %s", self.folder, fault)
        self.fault = fault
        self.close()

    def _full_notes(self) -> TakeNotes:
        return replace(self.notes, scenes=tuple(self.scenes))

    def _note(self) -> None:
        write_atomic(self.folder / NOTES, json.dumps(asdict(self._full_notes())) + "\n")


def left_over(folder: Path) -> Recorded:
    """A take that another run of the server has left. Raises InputError if it cannot be used."""
    content = read_json(folder / NOTES, "", "take")
    if not isinstance(content, dict):
        raise InputError(f"{folder / NOTES}: is no take; remove its folder")
    notes = build(TakeNotes, {**content, "scenes": ()})
    scenes = tuple(build(Scene, scene) for scene in content.get("scenes", ()))
    notes = replace(notes, scenes=scenes)
    whole = _whole_frames(folder / FRAMES)
    blocks = 0 if whole < notes.first_frames else 1 + (whole - notes.first_frames) // notes.block_frames
    return Recorded(folder, notes, blocks)


def _whole_frames(path: Path) -> int:
    """How many frames lie in the file to their ends."""
    count = 0
    try:
        with path.open("rb") as file:
            while _next(file) is not None:
                count += 1
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    return count


def _next(file: BinaryIO) -> bytes | None:
    """The next picture, or None where the file ends, or ends in the middle of one."""
    head = file.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    picture = file.read(length)
    return picture if len(picture) == length else None
