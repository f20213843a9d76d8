"""Looking at video files: what they hold, and their frames, as a player shows them.

Frames are upright (the file may say that they are to be turned) and their pixels square. All of a file is decoded, so a
cut one is told. This file does not know who made the video, so it does not say what to do about a broken one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from utils.errors import InputError
from utils.ffmpeg import ending, executable, file_url, run

Frames = npt.NDArray[np.uint8]
Times = npt.NDArray[np.float64]

_STREAM = re.compile(
    r"^\[info\]\s+Stream #0:\d+[^\n]*?: Video: (?P<codec>\w+)[^\n]*?, (?P<pix_fmt>[a-z]\w+)(?:\([^)\n]*\))?, \d+x\d+"
    r"(?P<more>[^\n]*)$",
    re.MULTILINE,
)
_BAD = re.compile(r"^(?:\[[^\]\n]*\] )*\[(?:error|fatal)\] (.*)$", re.MULTILINE)
_INPUT = re.compile(r"^\[info\] Input #0, (?P<format>[^\n]*?), from ", re.MULTILINE)
_TEXT_ART = frozenset({"tty", "bin", "xbin", "adf", "idf"})  # formats that draw any text file as a terminal would
_TICKS = 90_000  # a second, for times: whole numbers for all usual frame rates
_SQUARE = (
    0.05  # pixels this little wider or narrower are taken as square: scaling to sides that divide by 16 makes them
)
# The input turns frames itself. Wider or narrower pixels become square at the same height.
_UPRIGHT = f"scale=w='if(gt(abs(sar-1),{_SQUARE}),max(1,round(iw*sar)),iw)':h=ih:flags=bicubic"


class NotAWholeVideo(InputError):
    """The file itself is at fault: broken, cut off, or something else than a video."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds: sides in pixels as shown, the number of frames that decode, frames a second, formats."""

    width: int
    height: int
    frames: int
    fps: float
    codec: str
    pix_fmt: str


def _decode(path: Path, target: list[str]) -> tuple[bytes, str]:
    """Decode the first video stream of `path`; returns ffmpeg's standard output and its log.

    Cover pictures of audio files are no videos. Raises NotAWholeVideo if the file holds no video or any part of it does
    not decode, InputError if it is missing or ffmpeg does not come to its end.
    """
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from error
    command = [executable(), "-hide_banner", "-nostdin", "-nostats", "-loglevel", "level+info", "-i", file_url(path)]
    same_times = ["-fps_mode", "passthrough", "-enc_time_base", f"1:{_TICKS}"]
    done = run([*command, "-map", "0:V:0", "-vf", _UPRIGHT, *same_times, *target])
    log = done.stderr.decode("utf-8", "replace")
    if done.returncode < 0:
        raise InputError(f"{path}: {ending(done.returncode)} while it read this file. Run again.")
    if _INPUT.search(log) and not _video_streams(log):
        raise NotAWholeVideo(f"{path}: holds {'sound and ' if ': Audio: ' in log else ''}no moving picture.")
    bad = _BAD.findall(log)
    if done.returncode != 0 or bad:
        raise NotAWholeVideo(f"{path}: is not a whole video ({bad[0] if bad else ending(done.returncode)}).")
    return done.stdout, log


def _video_streams(log: str) -> list[re.Match[str]]:
    """The streams that `0:V` means, as the log tells of them."""
    found = _INPUT.search(log)
    if found is None or found["format"] in _TEXT_ART:
        return []
    header = log[found.start() :].partition("[info] Stream mapping:")[0]
    return [match for match in _STREAM.finditer(header) if "(attached pic)" not in match[0]]


def examine(path: Path) -> tuple[VideoInfo, Times]:
    """What the file `path` holds, and when each frame is shown, in seconds; all of it is decoded.

    Raises NotAWholeVideo for one that is broken, cut off, or something else, InputError if it cannot be read.
    """
    listing, log = _decode(path, ["-pix_fmt", "rgb24", "-f", "framecrc", "pipe:1"])
    stream = _video_streams(log)[0]
    lines = listing.decode("ascii", "replace").splitlines()
    head = dict(line[1:].split(": ", 1) for line in lines if line.startswith("#"))
    rows = [line.split(",") for line in lines if line and not line.startswith("#")]
    if not rows:
        raise NotAWholeVideo(f"{path}: holds no frames.")
    if len({row[4] for row in rows}) > 1:
        raise NotAWholeVideo(f"{path}: its frames change their size on the way, which is not supported.")
    width, height = (int(side) for side in head["dimensions 0"].split("x"))
    unit = [int(number) for number in head["tb 0"].split("/")]
    fps = re.search(r", ([\d.]+) fps", stream["more"])
    kind = {"codec": stream["codec"], "pix_fmt": stream["pix_fmt"]}
    info = VideoInfo(width, height, len(rows), float(fps[1]) if fps else 0.0, **kind)
    return info, np.array([int(row[2]) for row in rows]) * (unit[0] / unit[1])


def probe(path: Path) -> VideoInfo:
    """What the file `path` holds. Raises as `examine`."""
    return examine(path)[0]


def read_frames(path: Path) -> Frames:
    """All frames of the file `path`, uint8 [frames, H, W, 3], red first. Raises as `examine`."""
    # Netpbm's header says the size of what comes, also where frames were turned.
    raw, _ = _decode(path, ["-pix_fmt", "rgb24", "-f", "image2pipe", "-c:v", "ppm", "pipe:1"])
    header = re.match(rb"P6\n(\d+) (\d+)\n255\n", raw)
    if header is None:
        raise NotAWholeVideo(f"{path}: holds no frames.")
    width, height = int(header[1]), int(header[2])
    size = header.end() + height * width * 3
    if len(raw) % size:
        raise NotAWholeVideo(f"{path}: its frames change their size on the way, which is not supported.")
    frames = np.frombuffer(raw, np.uint8).reshape(-1, size)[:, header.end() :]
    return frames.reshape(-1, height, width, 3)
