"""Files that a user gives to be looked at: pictures and videos, upright, with square pixels, told apart by content.

What is neither is called what it is. This file does not know what the frames are for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.errors import InputError
from utils.pictures import examine_picture, read_picture
from utils.video_probe import Frames, NotAWholeVideo, Times, examine, read_frames

_HEAD = 4096  # bytes that tell what a file is
_GIVE = "Give an image (PNG, JPEG, WebP, ...) or a video (MP4, ...)."
_HEIC = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
_KINDS = ((b"%PDF-", "a PDF document"), (b"PK\x03\x04", "a ZIP archive or an office document"))


@dataclass(frozen=True)
class Media:
    """A picture or a video: sides in pixels as shown, and when each stored frame is shown, in seconds."""

    path: Path
    height: int
    width: int
    times: Times
    _read: Callable[[Path], Frames]

    @property
    def fps(self) -> float | None:
        """The usual number of frames a second; None for a single frame."""
        intervals = np.diff(self.times)
        intervals = intervals[intervals > 0]
        return float(1 / np.median(intervals)) if len(intervals) else None

    @property
    def even(self) -> bool:
        """Whether frames follow each other at (nearly) the same distance."""
        intervals = np.diff(self.times) * (self.fps or 0.0)
        return bool((abs(intervals - 1) < 0.5).all()) or bool((intervals <= 0).any())

    @property
    def frames(self) -> int:
        """How many there are at even distances: a frame that stays longer counts as several."""
        if self.even:
            return len(self.times)
        return round(float(self.times[-1] - self.times[0]) * (self.fps or 0.0)) + 1

    def read(self) -> Frames:
        """The `frames` frames, uint8 [frames, H, W, 3], red first. Raises InputError if the file cannot be read."""
        stored = self._read(self.path)
        if self.even:
            return stored
        places = (self.times - self.times[0]) * (self.fps or 0.0)
        return stored[np.searchsorted(places, np.arange(self.frames) + 0.5) - 1]


def open_media(path: Path) -> Media:
    """What the picture or video `path` holds; a video is decoded as a whole.

    Raises InputError, with what the file is instead, if it is neither, or broken.
    """
    other = _other_kind(path)
    if other:
        raise InputError(f"{path}: is {other}. {_GIVE}")
    picture = examine_picture(path)
    if picture is not None:
        return Media(path, *picture, read_picture)
    try:
        info, times = examine(path)
    except NotAWholeVideo as error:
        raise InputError(f"{error} {_GIVE}") from error
    return Media(path, info.height, info.width, times, read_frames)


def _other_kind(path: Path) -> str:
    """What `path` is if it can be no picture and no video, else ""."""
    if os.path.isdir(path):
        return "a folder"
    try:
        if os.path.exists(path) and not path.is_file():
            return "no ordinary file"
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from error
    if not head:
        return "an empty file"
    if head[4:8] == b"ftyp" and head[8:12] in _HEIC and examine_picture(path) is None:
        return "a HEIC picture, which cannot be read here; convert it to JPEG or PNG"
    kinds = [kind for beginning, kind in _KINDS if head.startswith(beginning)]
    return kinds[0] if kinds else "a text file" if _is_text(head) else ""


def _is_text(head: bytes) -> bool:
    """Whether `head` reads as text; its last character may be cut."""
    if re.match(rb"P[123]\s+[\d#]", head):  # Netpbm's pictures in words
        return False
    text = head.decode("utf-8", "replace").rstrip("\ufffd")
    return all(char.isprintable() or char in "\t\n\r\f\ufeff" for char in text) and "\ufffd" not in text
