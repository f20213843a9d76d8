"""The ffmpeg program that imageio-ffmpeg brings along: where it is, how it takes names, what its complaints mean.

This file does not know what is encoded or decoded.
"""

from __future__ import annotations

import signal
from pathlib import Path

from utils.files import disk_full

BITEXACT = ("-fflags", "+bitexact", "-map_metadata", "-1")  # neither versions nor dates go into a file

_FULL_MESSAGES = ("No space left on device", "Disk quota exceeded", "File too large", "not enough space on the disk")
_STDERR_TAIL = 2000  # characters of ffmpeg's complaint that go into an error message


def quiet_ffmpeg() -> list[str]:
    """The beginning of a command that overwrites its target and says nothing but errors."""
    return [executable(), "-y", "-hide_banner", "-nostats", "-loglevel", "error"]


def executable() -> str:
    """The program's path."""
    import imageio_ffmpeg  # type: ignore[import-untyped,unused-ignore]

    return str(imageio_ffmpeg.get_ffmpeg_exe())


def file_url(path: Path) -> str:
    """`path` as ffmpeg takes it whatever it holds: "a:b.mp4" would be a protocol, "-x.mp4" an option."""
    return f"file:{path}"


def failure(path: Path, status: int, stderr: bytes) -> Exception:
    """The error for ffmpeg's exit status while it wrote `path`: InputError for a full disk, else RuntimeError."""
    complaint = stderr.decode("utf-8", "replace").strip()
    over_limit = hasattr(signal, "SIGXFSZ") and status == -signal.SIGXFSZ
    if over_limit or any(message in complaint for message in _FULL_MESSAGES):
        return disk_full(path)
    detail = complaint[-_STDERR_TAIL:] or "it said nothing"
    return RuntimeError(f"{path}: ffmpeg ended with status {status}: {detail}")
