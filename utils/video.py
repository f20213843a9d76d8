"""Frames to H.264 files and back, through the ffmpeg program that imageio-ffmpeg brings along.

`VideoWriter` takes frames as they are made, so a video is never held in memory as a whole, and the file appears under
its name only when it is complete. `probe` and `read_frames` look at finished files. This file does not know where the
frames come from; names of unfinished files and their removal are the business of utils.files.
"""

from __future__ import annotations

import logging
import re
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from utils.errors import InputError
from utils.files import commit_partial, create_partial, disk_full, remove_stale_partials

__all__ = ["VideoInfo", "VideoWriter", "probe", "read_frames", "remove_stale_partials", "to_uint8"]

logger = logging.getLogger(__name__)

Frames = npt.NDArray[np.uint8]

_THREADS = 4  # fixed: x264's output depends on how many threads share the work
_FULL_MESSAGES = ("No space left on device", "Disk quota exceeded", "File too large", "not enough space on the disk")
_STDERR_TAIL = 2000  # characters of ffmpeg's complaint that go into an error message
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


def to_uint8(video: Tensor) -> Tensor:
    """Frames for a file: float [frames, 3, H, W] in [-1, 1] to uint8 [frames, H, W, 3], on the tensor's device.

    Values outside the range are clamped; halves round away from zero. Computed in float32.
    """
    scaled = video.float() * 127.5
    # Adding the half and cutting the fraction off rounds halves up, which is away from zero where nothing is negative.
    return scaled.add_(128.0).clamp_(0.0, 255.0).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _ffmpeg() -> str:
    import imageio_ffmpeg  # type: ignore[import-untyped,unused-ignore]

    return str(imageio_ffmpeg.get_ffmpeg_exe())


def _file_url(path: Path) -> str:
    """`path` as ffmpeg takes it whatever it holds: "a:b.mp4" would be a protocol, "-x.mp4" an option."""
    return f"file:{path}"


@final
class VideoWriter:
    """A context manager that streams frames into an H.264 mp4 (yuv420p, BT.709, the index first).

        with VideoWriter(path, width=832, height=480) as writer:
            writer.write(frames)

    The file gets its name when the block ends without an exception, after its bytes have reached the disk; otherwise
    (KeyboardInterrupt too) ffmpeg is ended and the unfinished file removed. A process that is killed leaves a hidden
    partial file at most, see `remove_stale_partials`. The same frames give the same bytes on the same machine.
    """

    def __init__(
        self,
        path: Path,
        width: int,
        height: int,
        fps: float = 16,
        crf: int = 18,
        preset: str = "veryfast",
        codec: str = "libx264",
    ) -> None:
        """`width`, `height` in pixels; `crf` x264's quality, 0 (lossless) to 51. Raises InputError for odd sides."""
        if width < 2 or height < 2 or width % 2 or height % 2:
            raise InputError(
                f"resolution: {path.name} would be {width} x {height} pixels, but H.264 in yuv420p needs even sides. "
                f"Use {width + width % 2 or 2} x {height + height % 2 or 2}."
            )
        self.path = path
        self.frames_written = 0
        self._frame_shape = (height, width, 3)
        self._options = ["-c:v", codec, "-preset", preset, "-crf", str(crf)]
        self._fps = fps
        self._partial: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] | None = None

    def _command(self, partial: Path) -> list[str]:
        height, width, _ = self._frame_shape
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-framerate", str(self._fps)]
        # Players take untagged video of this size for BT.601 or BT.709 as they like: convert to one and say so.
        convert = "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int+bitexact"
        declare = "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
        colour = ["-vf", f"{convert},format=yuv420p,{declare}"]
        # filter_units drops SEI units: x264 puts its version and options in one.
        exact = ["-threads", str(_THREADS), "-fflags", "+bitexact", "-flags:v", "+bitexact", "-map_metadata", "-1"]
        exact += ["-bsf:v", "filter_units=remove_types=6"]
        target = ["-movflags", "+faststart", "-f", "mp4", _file_url(partial)]
        quiet = [_ffmpeg(), "-y", "-hide_banner", "-nostats", "-loglevel", "error"]
        return [*quiet, *source, "-i", "pipe:0", "-an", *colour, *self._options, *exact, *target]

    def __enter__(self) -> VideoWriter:
        """Start ffmpeg. Raises InputError if no file can be made in the folder."""
        assert self._process is None, "a VideoWriter writes one file"
        self._partial = create_partial(self.path)
        try:
            # A file never fills up as a pipe does, so ffmpeg cannot block on its complaints.
            self._stderr = tempfile.TemporaryFile()
            self._process = subprocess.Popen(
                self._command(self._partial),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                start_new_session=True,  # Ctrl-C reaches this process alone, which then ends ffmpeg in order
            )
        except BaseException:
            self._abort()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the file, or remove what there is of it if the block was left by an exception."""
        if kind is not None:
            self._abort()
            return
        try:
            self._finish()
        except BaseException:
            self._abort()
            raise

    def write(self, frames: Frames | Tensor) -> None:
        """Append frames: uint8 [frames, H, W, 3], red first, a NumPy array or a tensor on any device.

        Blocks while ffmpeg is behind. Raises ValueError for another shape or type, InputError when the disk is full,
        RuntimeError when ffmpeg fails for another reason.
        """
        array = frames.detach().cpu().numpy() if isinstance(frames, Tensor) else frames
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != self._frame_shape:
            raise ValueError(f"frames must be uint8 [frames, *{self._frame_shape}], not {array.dtype} {array.shape}")
        if self._process is None or self._process.stdin is None:
            raise ValueError(f"the writer of {self.path} is not open: write inside its with block")
        try:
            self._process.stdin.write(np.ascontiguousarray(array).reshape(-1).data)
            self._process.stdin.flush()
        except OSError as error:  # a broken pipe: ffmpeg has ended, and its own words say why
            self._process.wait()
            raise self._failure(self._process.returncode) from error
        self.frames_written += len(array)

    def _finish(self) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._partial is not None
        if self.frames_written == 0:
            raise RuntimeError(f"{self.path}: no frame was written, so there is no video to finish")
        self._process.stdin.close()
        status = self._process.wait()
        if status != 0:
            raise self._failure(status)
        commit_partial(self._partial, self.path)
        self._release()

    def _abort(self) -> None:
        """End ffmpeg, wait for it and remove the partial file. Safe at any time, and more than once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._release()
        if self._partial is not None:
            self._partial.unlink(missing_ok=True)

    def _release(self) -> None:
        """Close what is open once ffmpeg has ended."""
        if self._process is not None and self._process.stdin is not None:
            try:
                self._process.stdin.close()
            except OSError:
                logger.debug("%s: frames that ffmpeg did not take are thrown away", self.path)
        if self._stderr is not None:
            self._stderr.close()
        self._process = self._stderr = None

    def _failure(self, status: int) -> Exception:
        """The error for ffmpeg's exit status, from what it wrote to stderr."""
        assert self._stderr is not None
        self._stderr.seek(0)
        complaint = self._stderr.read().decode("utf-8", "replace").strip()
        over_limit = hasattr(signal, "SIGXFSZ") and status == -signal.SIGXFSZ
        if over_limit or any(message in complaint for message in _FULL_MESSAGES):
            return disk_full(self.path)
        detail = complaint[-_STDERR_TAIL:] or "it said nothing"
        return RuntimeError(f"{self.path}: ffmpeg ended with status {status}: {detail}")


def _decode(path: Path, target: list[str]) -> tuple[bytes, str]:
    """Decode the first video stream of `path`; returns ffmpeg's standard output and its log.

    Raises InputError if the file is missing, or any part of it does not decode.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such video file. Check the path.")
    command = [_ffmpeg(), "-hide_banner", "-nostdin", "-nostats", "-loglevel", "level+info", "-i", _file_url(path)]
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
