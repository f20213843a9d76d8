"""Video files that can be watched while they grow, and what remains of them when their writer is killed.

A growing file is a fragmented mp4: a header, then fragments that are each complete in themselves, so a player can open
it at any time and a cut end costs the last fragment alone. It carries a visible name that says so, `x.growing.mp4`
beside `x.mp4`; the final name is given only to a complete, ordinary mp4 made of it by copying the encoded frames. This
file does not know how frames are made or encoded.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from utils.errors import InputError
from utils.ffmpeg import BITEXACT, failure, file_url, quiet_ffmpeg, run
from utils.files import atomic_write, create_beside, write_error

logger = logging.getLogger(__name__)

# Every frame is a fragment of its own (about 100 bytes more) and leaves ffmpeg's buffers when the next one comes.
FRAGMENTED = ("-flush_packets", "1", "-movflags", "+frag_every_frame+empty_moov+default_base_moof")
# x264 holds frames back: for B frames, for rate control, and one for each thread that works on a frame of its own. This
# leaves three frames, where its defaults hold back up to the first four seconds.
LOW_DELAY = ("-bf", "0", "-x264-params", "rc-lookahead=2:sync-lookahead=0:sliced-threads=1")

_MARK = ".growing"


def growing_path(path: Path) -> Path:
    """The name beside `path` under which it grows: x.mp4 -> x.growing.mp4."""
    return path.with_name(f"{path.stem}{_MARK}{path.suffix}")


def recovered_path(growing: Path) -> Path:
    """Where `recover` puts what it can: x.growing.mp4 -> x.recovered.mp4."""
    return growing.with_name(f"{growing.stem.removesuffix(_MARK)}.recovered.mp4")


def create_growing(path: Path) -> Path:
    """Create the empty growing file of `path`; one that an earlier run left is replaced.

    Raises InputError if `path` is a folder or the file cannot be created.
    """
    growing = growing_path(path)
    try:
        # Removed, not emptied: a killed run's ffmpeg may still be finishing the old file for a moment.
        growing.unlink()
        logger.info("%s: left by an earlier run, replaced", growing)
    except FileNotFoundError:
        logger.debug("%s: new", growing)
    except OSError as error:
        raise write_error(growing, error) from error
    return create_beside(path, growing)


def keep_or_remove(growing: Path) -> None:
    """After an interruption: keep a growing file that holds something and say where it is, remove an empty one."""
    try:
        frames = whole_fragments(growing).count
        if frames == 0:
            growing.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        logger.warning("%s: is left as it is (%s)", growing, error.strerror)
        return
    if frames:
        logger.warning("%s: %d frames are kept; python -m utils.recover makes a video of them", growing, frames)


def make_ordinary(growing: Path, partial: Path, path: Path) -> None:
    """Make an ordinary mp4 of a complete growing file, in the file `partial` that is to become `path`.

    The growing file stays. Raises InputError when there is no room for both, or ffmpeg fails.
    """
    _copy(growing, None, partial, path)


def remove_finished(growing: Path, path: Path) -> None:
    """Remove the growing file of the video `path`, which is complete."""
    try:
        growing.unlink(missing_ok=True)
    except OSError as error:  # Windows, while a player has it open
        logger.warning("%s: can go, %s is complete, but cannot be deleted (%s)", growing, path, error.strerror)


def remove_overtaken(path: Path, frames: int) -> None:
    """Remove the growing file of the video `path` of `frames` frames if that was made of it: if a kill came between.

    One with other frames, or that has grown after the video was made, is of another run and stays.
    """
    growing = growing_path(path)
    try:
        older = growing.stat().st_mtime_ns <= path.stat().st_mtime_ns
        if older and whole_fragments(growing).count == frames:
            remove_finished(growing, path)
    except FileNotFoundError:
        return


@dataclass(frozen=True)
class Fragments:
    """The fragments of an mp4 that are there as a whole: how many, and the byte after the last one."""

    count: int
    end: int


def whole_fragments(path: Path) -> Fragments:
    """Counts the pairs of `moof` and `mdat` boxes (ISO/IEC 14496-12, 8.8.4) before the first that is cut off."""
    size = path.stat().st_size
    count = end = position = 0
    opened = False
    with path.open("rb") as file:
        while position + 8 <= size:
            file.seek(position)
            head = file.read(16)
            kind, length = head[4:8], int.from_bytes(head[:4], "big")
            if length == 1:  # the length follows in 64 bits
                length = int.from_bytes(head[8:16], "big")
            if length < 8 or position + length > size:  # 0: a box to the end of the file, or a hole left by a crash
                break
            position += length
            if kind == b"mdat" and opened:
                count, end = count + 1, position
            opened = kind == b"moof"
    return Fragments(count, end)


def recover(growing: Path) -> Path:
    """Make an ordinary mp4 of the whole fragments of a growing file, `x.recovered.mp4` beside it; returns its path.

    The growing file stays, and may still be growing. A former recovery is replaced. The fragments stand in memory,
    encoded, while they are copied. Raises InputError if the file is missing or holds no whole fragment.
    """
    if not growing.is_file():
        raise InputError(f"{growing}: no such file. Give a file that ends in {_MARK}.mp4.")
    fragments = whole_fragments(growing)
    if fragments.count == 0:
        raise InputError(
            f"{growing}: holds no whole fragment, so nothing can be recovered. Only videos written with "
            f"stream_output: true can be, and their names end in {_MARK}.mp4."
        )
    target = recovered_path(growing)
    with atomic_write(target) as partial:
        _copy(growing, fragments.end, partial, target)
    return target


def _copy(source: Path, length: int | None, partial: Path, path: Path) -> None:
    """Copy the encoded frames of the first `length` bytes of `source` (None: all) to an ordinary mp4, index first."""
    given = None if length is None else _head(source, length)
    origin = file_url(source) if given is None else "pipe:0"
    tidy = [*BITEXACT, "-movflags", "+faststart", "-f", "mp4", file_url(partial)]
    done = run([*quiet_ffmpeg(), "-i", origin, "-map", "0:v:0", "-c", "copy", *tidy], given or b"")
    if done.returncode != 0:
        raise failure(path, done.returncode, done.stderr)


def _head(path: Path, length: int) -> bytes:
    with path.open("rb") as file:
        return file.read(length)
