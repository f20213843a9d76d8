"""The ffmpeg program that imageio-ffmpeg brings along: where it is, how it takes names, what its complaints mean.

This file does not know what is encoded or decoded.
"""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

from utils.errors import InputError
from utils.files import disk_full

BITEXACT = ("-fflags", "+bitexact", "-map_metadata", "-1")  # neither versions nor dates go into a file

NVENC = "h264_nvenc"  # the encoder of NVIDIA GPUs

_FULL_MESSAGES = ("No space left on device", "Disk quota exceeded", "File too large", "not enough space on the disk")
_STDERR_TAIL = 2000  # characters of ffmpeg's complaint that go into an error message


def quiet_ffmpeg() -> list[str]:
    """The beginning of a command that overwrites its target and says nothing but errors."""
    return [executable(), "-y", "-hide_banner", "-nostats", "-loglevel", "error"]


def executable() -> str:
    """The program's path."""
    import imageio_ffmpeg  # type: ignore[import-untyped,unused-ignore]

    return str(imageio_ffmpeg.get_ffmpeg_exe())


def nvenc_quality(crf: int, low_delay: bool) -> list[str]:
    """Options of `NVENC` for a constant quality; its scale is like that of x264's crf."""
    delay = ["-tune", "ull", "-bf", "0"] if low_delay else ["-tune", "hq"]
    return ["-preset", "p4", "-rc", "vbr", "-cq", str(crf), "-b:v", "0", *delay]


def check_codec(codec: str) -> None:
    """Encode a frame of nothing, so that what does not work is found before anything is made. Raises InputError."""
    frame = ["-f", "lavfi", "-i", "color=size=256x256:rate=1", "-frames:v", "1", "-pix_fmt", "yuv420p"]
    command = [*quiet_ffmpeg(), *frame, "-c:v", codec, "-f", "null", "-"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["it said nothing"]
        raise InputError(
            f"video_codec: ffmpeg cannot encode with {codec} here ({said[0]}); use video_codec=libx264, or set "
            "IMAGEIO_FFMPEG_EXE to an ffmpeg that can"
        )


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
