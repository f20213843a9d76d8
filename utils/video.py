"""Frames to H.264 files, through the ffmpeg program that imageio-ffmpeg brings along.

`VideoWriter` takes frames as they are made, so a video is never held in memory as a whole, and the file appears under
its name only when it is complete; while it is made it can be watched under another (utils.growing). `probe` and
`read_frames` look at finished files. This file does not know where the frames come from; names of unfinished files and
their removal are the business of utils.files.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, final

import numpy as np
import torch
from torch import Tensor

from utils.errors import InputError
from utils.ffmpeg import BITEXACT, NVENC, failure, file_url, nvenc_quality, quiet_ffmpeg, start
from utils.files import commit_partial, create_partial, remove_partial, remove_stale_partials
from utils.growing import FRAGMENTED, LOW_DELAY, create_growing, keep_or_remove, make_ordinary, remove_finished
from utils.video_probe import Frames, VideoInfo, probe, read_frames

__all__ = ["Frames", "VideoInfo", "VideoWriter", "probe", "read_frames", "remove_stale_partials", "to_uint8"]

logger = logging.getLogger(__name__)

_THREADS = 4  # fixed: x264's output depends on how many threads share the work
_DRAIN_S = 10.0  # how long an interrupted writer waits for ffmpeg to put down the frames it has


def to_uint8(video: Tensor) -> Tensor:
    """Frames for a file: float [frames, 3, H, W] in [-1, 1] to uint8 [frames, H, W, 3], on the tensor's device.

    Values outside the range are clamped; halves round away from zero. Computed in float32.
    """
    scaled = video.float() * 127.5
    # Adding the half and cutting the fraction off rounds halves up, which is away from zero where nothing is negative.
    return scaled.add_(128.0).clamp_(0.0, 255.0).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _temporary_file() -> IO[bytes]:
    """For ffmpeg's complaints: unlike a pipe a file never fills up, so ffmpeg cannot block on them."""
    try:
        return tempfile.TemporaryFile()
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"TMPDIR: no temporary file can be made ({reason}); set it to a folder with room") from error


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Within the context SIGINT and SIGTERM wait; they come when it is left (where the system can mask signals)."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@final
class VideoWriter:
    """A context manager that streams frames into an H.264 mp4 (yuv420p, BT.709, the index first).

        with VideoWriter(path, width=832, height=480) as writer:
            writer.write(frames)

    The file gets its name when the block ends without an exception, after its bytes have reached the disk; otherwise
    (KeyboardInterrupt too) ffmpeg is ended and the unfinished file removed. A process that is killed leaves a hidden
    partial file at most, see `remove_stale_partials`. The same frames give the same bytes on the same machine. Whatever
    has to be there before the video gets its name is made between `finish` and the end of the block.

    With `stream` the video can be watched in `x.growing.mp4` while it is made, four frames behind what was written;
    that file is kept when the block ends with an exception or the process is killed, and `utils.growing.recover` makes
    a video of it. Otherwise it turns into the ordinary mp4 `path` in the end. The price: files 6 to 16 % larger at
    the same quality, as x264 looks ahead less and uses no B frames, and in the end room on the disk for a second copy.
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
        stream: bool = False,
    ) -> None:
        """`width`, `height` in pixels; `crf` x264's quality, 0 (lossless) to 51, or the like of another codec, which
        `preset` is not for. Raises InputError for odd sides."""
        if width < 2 or height < 2 or width % 2 or height % 2:
            raise InputError(
                f"resolution: {path.name} would be {width} x {height} pixels, but H.264 in yuv420p needs even sides. "
                f"Use {width + width % 2 or 2} x {height + height % 2 or 2}."
            )
        self.path = path
        self.frames_written = 0
        self._frame_shape = (height, width, 3)
        quality = ["-preset", preset, "-crf", str(crf), *(LOW_DELAY if stream else ())]
        self._options = ["-c:v", codec, *(nvenc_quality(crf, stream) if codec == NVENC else quality)]
        self._fps = fps
        self._stream = stream
        self._growing: Path | None = None
        self._partial: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] | None = None

    def _command(self, unfinished: Path) -> list[str]:
        height, width, _ = self._frame_shape
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-framerate", str(self._fps)]
        # Players take untagged video of this size for BT.601 or BT.709 as they like: convert to one and say so.
        convert = "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int+bitexact"
        declare = "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
        colour = ["-vf", f"{convert},format=yuv420p,{declare}"]
        # filter_units drops SEI units: x264 puts its version and options in one.
        exact = ["-threads", str(_THREADS), "-flags:v", "+bitexact", *BITEXACT, "-bsf:v", "filter_units=remove_types=6"]
        layout = FRAGMENTED if self._stream else ("-movflags", "+faststart")
        target = [*layout, "-f", "mp4", file_url(unfinished)]
        return [*quiet_ffmpeg(), *source, "-i", "pipe:0", "-an", *colour, *self._options, *exact, *target]

    def __enter__(self) -> VideoWriter:
        """Start ffmpeg. Raises InputError if no file can be made in the folder."""
        assert self._process is None, "a VideoWriter writes one file"
        try:
            self._stderr = _temporary_file()
            with _interrupts_wait():  # one in the middle would leave an ffmpeg that nobody knows
                self._start(self._stderr)
        except BaseException:
            self._abort()
            raise
        return self

    def _start(self, stderr: IO[bytes]) -> None:
        if self._stream:
            target = self._growing = create_growing(self.path)
        else:
            target = self._partial = create_partial(self.path)
        self._process = start(self._command(target), subprocess.PIPE, subprocess.DEVNULL, stderr)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the file, or remove what there is of it if the block was left by an exception."""
        if kind is not None:
            self._abort()
            return
        try:
            if self._process is not None:
                self.finish()
            commit_partial(self.finished_file, self.path)
            if self._growing is not None:
                remove_finished(self._growing, self.path)
        except BaseException:
            self._abort()
            raise

    def write(self, frames: Frames | Tensor) -> None:
        """Append frames: uint8 [frames, H, W, 3], red first, a NumPy array or a tensor on any device.

        Blocks while ffmpeg is behind. Raises ValueError for another shape or type, InputError when the disk is full or
        ffmpeg has come to its end for another reason.
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

    def kill(self) -> None:
        """End ffmpeg at once, so that a `write` in another thread fails; the file is lost."""
        if self._process is not None:
            self._process.kill()

    def finish(self) -> None:
        """No more frames come: wait until all of them are in `finished_file`. That gets its name when the block ends.
        Raises as `write`, and RuntimeError if there was no frame."""
        assert self._process is not None
        assert self._process.stdin is not None
        if self.frames_written == 0:
            raise RuntimeError(f"{self.path}: no frame was written, so there is no video to finish")
        with suppress(BrokenPipeError):  # ffmpeg has ended, and its status says how
            self._process.stdin.close()
        status = self._process.wait()
        if status != 0:
            raise self._failure(status)
        self._release()
        if self._growing is not None:
            self._partial = create_partial(self.path)
            make_ordinary(self._growing, self._partial, self.path)

    @property
    def finished_file(self) -> Path:
        """After `finish`: the whole video, under a name for the time being."""
        assert self._partial is not None and self._process is None, "finish comes first"
        return self._partial

    def _abort(self) -> None:
        """End ffmpeg, wait for it, and remove the unfinished file unless it can be watched. Safe more than once; an
        interruption while it waits ends the wait alone: an error of a process that has lost another one is often
        followed by its launcher's SIGTERM."""
        try:
            self._end()
        finally:
            if self._partial is not None:
                remove_partial(self._partial)
            if self._growing is not None:
                keep_or_remove(self._growing)

    def _end(self) -> None:
        try:
            if self._process is not None and self._stream:
                self._drain(self._process)
        finally:
            try:
                if self._process is not None:
                    self._process.kill()
                    self._process.wait()
            finally:
                self._release()

    def _drain(self, process: subprocess.Popen[bytes]) -> None:
        """Let ffmpeg put down the frames that it has been given."""
        assert process.stdin is not None
        try:
            process.stdin.close()
            process.wait(_DRAIN_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            logger.debug("%s: the last frames are lost (%s)", self.path, error)

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

    def _failure(self, status: int) -> InputError:
        """The error for ffmpeg's exit status, from what it wrote to stderr."""
        assert self._stderr is not None
        self._stderr.seek(0)
        return failure(self.path, status, self._stderr.read())
