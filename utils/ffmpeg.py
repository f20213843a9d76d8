"""The ffmpeg program that imageio-ffmpeg brings along: where it is, how it takes names, what its complaints mean.

However it ends, the user gets an InputError of one line. This file does not know what is encoded or decoded.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import IO

from utils.errors import InputError
from utils.files import disk_full

BITEXACT = ("-fflags", "+bitexact", "-map_metadata", "-1")  # neither versions nor dates go into a file

NVENC = "h264_nvenc"  # the encoder of NVIDIA GPUs

_FULL_MESSAGES = ("No space left on device", "Disk quota exceeded", "File too large", "not enough space on the disk")
_COMPLAINT_TAIL = 500  # characters of ffmpeg's complaint that go into an error message
_OTHER = "set IMAGEIO_FFMPEG_EXE to an ffmpeg that does"


def quiet_ffmpeg() -> list[str]:
    """The beginning of a command that overwrites its target and says nothing but errors."""
    return [executable(), "-y", "-hide_banner", "-nostats", "-loglevel", "error"]


def executable() -> str:
    """The program's path. Raises InputError if there is none."""
    try:
        import imageio_ffmpeg  # type: ignore[import-untyped,unused-ignore]

        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"ffmpeg: none is found that runs here. Install imageio-ffmpeg (pip install imageio-ffmpeg), or {_OTHER}."
        ) from error


def start(command: Sequence[str], stdin: int, stdout: int, stderr: int | IO[bytes]) -> subprocess.Popen[bytes]:
    """Begin `command` (whose first word is `executable()`). Raises InputError if the system does not start it."""
    try:
        # In a session of its own Ctrl-C does not reach ffmpeg: this process alone decides what is finished and kept.
        return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True)
    except OSError as error:
        raise InputError(
            f"ffmpeg: {command[0]} cannot be started ({error.strerror or error}). If IMAGEIO_FFMPEG_EXE is set, see "
            f"that it names a program; else install imageio-ffmpeg anew, or {_OTHER}."
        ) from error


def run(command: Sequence[str], given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Let `command` work on `given` to its end; its status is the caller's business. Raises InputError as `start`."""
    with start(command, subprocess.PIPE, subprocess.PIPE, subprocess.PIPE) as process:
        try:
            output, complaints = process.communicate(given)
        except BaseException:  # an interruption
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, complaints)


def nvenc_quality(crf: int, low_delay: bool) -> list[str]:
    """Options of `NVENC` for a constant quality; its scale is like that of x264's crf."""
    delay = ["-tune", "ull", "-bf", "0"] if low_delay else ["-tune", "hq"]
    return ["-preset", "p4", "-rc", "vbr", "-cq", str(crf), "-b:v", "0", *delay]


def check_codec(codec: str) -> None:
    """Encode a frame of nothing, so that what does not work is found before anything is made. Raises InputError."""
    _check_codec(executable(), codec)


@cache
def _check_codec(program: str, codec: str) -> None:
    frame = ["-f", "lavfi", "-i", "color=size=256x256:rate=1", "-frames:v", "1", "-pix_fmt", "yuv420p"]
    done = run([program, "-hide_banner", "-nostats", "-loglevel", "error", *frame, "-c:v", codec, "-f", "null", "-"])
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines() or [ending(done.returncode)]
        remedy = _OTHER if codec == "libx264" else f"use video_codec=libx264, or {_OTHER}"
        raise InputError(f"video_codec: ffmpeg cannot encode with {codec} here ({said[0]}); {remedy}")


def file_url(path: Path) -> str:
    """`path` as ffmpeg takes it whatever it holds: "a:b.mp4" would be a protocol, "-x.mp4" an option."""
    return f"file:{path}"


def ending(status: int) -> str:
    """How ffmpeg ended, for people: "ffmpeg ended with status 1", "ffmpeg was killed (SIGKILL)"."""
    if status >= 0:
        return f"ffmpeg ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    killed = name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")
    return f"ffmpeg was killed ({name})" if killed else f"ffmpeg crashed ({name})"


def failure(path: Path, status: int, stderr: bytes) -> InputError:
    """The error for ffmpeg's exit status while it wrote `path`, with what it wrote to `stderr`; one line."""
    complaint = stderr.decode("utf-8", "replace")
    over_limit = hasattr(signal, "SIGXFSZ") and status == -signal.SIGXFSZ
    if over_limit or any(message in complaint for message in _FULL_MESSAGES):
        return disk_full(path)
    said = " ".join(complaint.split())[-_COMPLAINT_TAIL:]
    often = "" if status >= 0 else "; systems kill programs when memory runs out, so see that some is free"
    return InputError(
        f"{path}: {ending(status)} before the file was complete{f': {said}' if said else ''}. Run again to make it, "
        f"what is finished is kept{often}."
    )
