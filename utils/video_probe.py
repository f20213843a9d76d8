"""Looking at finished video files: what they hold, and their frames. All of a file is decoded, so a cut one is told."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from utils.errors import InputError
from utils.ffmpeg import executable, file_url

Frames = npt.NDArray[np.uint8]

_STREAM = re.compile(
    r"Stream #0:\d+.*?: Video: (?P<codec>\w+).*?, (?P<pix_fmt>[a-z]\w+)(?:\([^)]*\))?, "
    r"(?P<width>\d+)x(?P<height>\d+).*?, (?P<fps>[\d.]+) fps"
)


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds: sides in pixels, the number of frames that decode, frames a second, formats."""

    width: int
    height: int
    frames: int
    fps: float
    codec: str
    pix_fmt: str


def _decode(path: Path, target: list[str]) -> tuple[bytes, str]:
    """Decode the first video stream of `path`; returns ffmpeg's standard output and its log.

    Raises InputError if the file is missing, or any part of it does not decode.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such video file. Check the path.")
    command = [executable(), "-hide_banner", "-nostdin", "-nostats", "-loglevel", "level+info", "-i", file_url(path)]
    done = subprocess.run([*command, "-map", "0:v:0", *target], capture_output=True, check=False)
    log = done.stderr.decode("utf-8", "replace")
    bad = [line for line in log.splitlines() if "[error]" in line or "[fatal]" in line]
    if done.returncode != 0 or bad:
        reason = bad[0] if bad else f"ffmpeg ended with status {done.returncode}"
        raise InputError(f"{path}: is not a whole video ({reason}). Delete it and make it again.")
    return done.stdout, log


def _stream(path: Path, log: str) -> re.Match[str]:
    match = _STREAM.search(log)
    if match is None:
        raise InputError(f"{path}: has no video stream that can be read. Check that it is a video file.")
    return match


def probe(path: Path) -> VideoInfo:
    """What the file `path` holds; all of it is decoded to count the frames.

    Raises InputError if the file is missing, broken or cut off.
    """
    progress, log = _decode(path, ["-f", "null", "-progress", "pipe:1", "-"])
    stream = _stream(path, log)
    counts = re.findall(rb"^frame=\s*(\d+)", progress, re.MULTILINE)
    frames = int(counts[-1]) if counts else 0
    if frames == 0:
        raise InputError(f"{path}: holds no frames. Delete it and make it again.")
    sides = {"width": int(stream["width"]), "height": int(stream["height"])}
    return VideoInfo(**sides, frames=frames, fps=float(stream["fps"]), codec=stream["codec"], pix_fmt=stream["pix_fmt"])


def read_frames(path: Path) -> Frames:
    """All frames of the file `path`, uint8 [frames, H, W, 3], red first.

    Raises InputError if the file is missing, broken or cut off.
    """
    raw, log = _decode(path, ["-f", "rawvideo", "-pix_fmt", "rgb24", "-fps_mode", "passthrough", "pipe:1"])
    stream = _stream(path, log)
    return np.frombuffer(raw, np.uint8).reshape(-1, int(stream["height"]), int(stream["width"]), 3)
