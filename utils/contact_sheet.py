"""A picture of a whole video: evenly spaced frames side by side, in a PNG beside the file."""

from __future__ import annotations

import subprocess
from pathlib import Path

from utils.ffmpeg import failure, file_url, quiet_ffmpeg
from utils.files import atomic_write

COLUMNS, ROWS = 4, 3
MARGIN = 2  # pixels between frames


def write_contact_sheet(video: Path, frames: int) -> Path:
    """Write `video`'s name with .png: up to 12 of its `frames` frames, the first and the last among them.

    Raises InputError if the disk is full, RuntimeError if ffmpeg fails for another reason.
    """
    shown = min(COLUMNS * ROWS, frames)
    chosen = sorted({round(i * (frames - 1) / max(shown - 1, 1)) for i in range(shown)})
    select = "+".join(f"eq(n\\,{number})" for number in chosen)
    rows = -(-len(chosen) // COLUMNS)
    columns = min(COLUMNS, len(chosen))
    path = video.with_suffix(".png")
    tiles = f"select={select},tile={columns}x{rows}:padding={MARGIN}:color=white"
    with atomic_write(path) as partial:
        target = ["-vf", tiles, "-frames:v", "1", "-f", "image2", file_url(partial)]
        command = [*quiet_ffmpeg(), "-i", file_url(video), *target]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if done.returncode != 0:
            raise failure(path, done.returncode, done.stderr)
    return path
