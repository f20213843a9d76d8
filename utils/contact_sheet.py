"""A picture of a whole video: evenly spaced frames side by side, in a PNG beside the file."""

from __future__ import annotations

from pathlib import Path

from utils.ffmpeg import failure, file_url, quiet_ffmpeg, run
from utils.files import atomic_write

COLUMNS, ROWS = 4, 3
MARGIN = 2  # pixels between frames


def sheet_path(video: Path) -> Path:
    """The name of `video`'s contact sheet."""
    return video.with_suffix(".png")


def write_contact_sheet(video: Path, frames: int) -> Path:
    """Make the contact sheet of the finished file `video`; returns its path. Raises as `draw_contact_sheet`."""
    path = sheet_path(video)
    with atomic_write(path) as partial:
        draw_contact_sheet(video, frames, partial, path)
    return path


def draw_contact_sheet(video: Path, frames: int, partial: Path, path: Path) -> None:
    """Up to 12 of the `frames` frames of the file `video`, the first and the last among them, into the file `partial`
    that is to become `path`.

    Raises InputError if the disk is full or ffmpeg fails for another reason.
    """
    shown = min(COLUMNS * ROWS, frames)
    chosen = sorted({round(i * (frames - 1) / max(shown - 1, 1)) for i in range(shown)})
    select = "+".join(f"eq(n\\,{number})" for number in chosen)
    rows = -(-len(chosen) // COLUMNS)
    columns = min(COLUMNS, len(chosen))
    tiles = f"select={select},tile={columns}x{rows}:padding={MARGIN}:color=white"
    target = ["-vf", tiles, "-frames:v", "1", "-f", "image2", "-update", "1", file_url(partial)]
    done = run([*quiet_ffmpeg(), "-i", file_url(video), *target])
    if done.returncode != 0:
        raise failure(path, done.returncode, done.stderr)
