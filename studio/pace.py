"""When the next block is due: late enough for prompts to be quick, early enough for the picture not to stop.

A block begins when the frames that the slowest steering viewer has not yet seen would last no longer than it takes to
make it, with some room; and never when they have a whole block before them.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable

from studio.settings import STALE_S
from studio.viewer import Viewer

ROOM = 1.5  # times what a block takes
MARGIN_S = 0.25  # for reports of positions, the network and the viewer's decoder
REMEMBERED = 8  # blocks whose times count


class Pace:
    """`fps` of the video, `block_frames` of a block."""

    def __init__(self, fps: float, block_frames: int) -> None:
        self._fps = fps
        self._block_frames = block_frames
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)

    def took(self, seconds: float) -> None:
        """A block took so long, from when it was due until its frames were on their way."""
        self._seconds.append(seconds)

    @property
    def lead(self) -> int:
        """So many frames before a viewer's last one the next block begins."""
        if not self._seconds:
            return self._block_frames
        needed = math.ceil(self._fps * (ROOM * max(self._seconds) + MARGIN_S))
        return min(needed, self._block_frames)

    @property
    def capacity(self) -> float | None:
        """Frames a second that could be made."""
        return self._block_frames / self.block_s if self.block_s else None

    @property
    def block_s(self) -> float | None:
        """What a block takes."""
        return sum(self._seconds) / len(self._seconds) if self._seconds else None

    @property
    def playing_fps(self) -> float:
        """The rate at which viewers should play: the video's, or what can be made if that is less."""
        return min(self._fps, (self.capacity or math.inf) * 0.97)

    def is_due(self, made: int, take: int, viewers: Iterable[Viewer]) -> bool:
        """Whether to make the next block when there are `made` frames of take number `take`."""
        shown = slowest(take, viewers)
        return shown is not None and made - shown <= self.lead


def slowest(take: int, viewers: Iterable[Viewer]) -> int | None:
    """The frames of the take that every steering viewer has seen who has been heard of lately; None if none steers.

    Where nothing is heard of any of them, the one who has seen least holds the video up: nobody is watching.
    """
    steering = [viewer for viewer in viewers if viewer.steers]
    now = time.monotonic()
    lively = [viewer for viewer in steering if now - viewer.heard < STALE_S] or steering
    return min((viewer.shown if viewer.take == take else 0 for viewer in lively), default=None)
