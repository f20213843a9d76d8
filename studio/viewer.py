"""A viewer: what waits to be sent, how far they have watched, and how fast they may talk.

The outbox is bounded. Pictures give way, the oldest first, so a slow viewer loses frames and the server no memory;
events do not, so one who takes none of them either is sent away.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from studio.settings import EXCESS_MESSAGES, MESSAGES_A_SECOND, MESSAGES_AT_ONCE

QUEUED_FRAMES = 36  # three blocks of a Wan model
QUEUED_EVENTS = 500


@dataclass(eq=False)
class Viewer:
    """One connection. `shown` is how many frames of take `take` have been on screen, as the viewer says, at `heard`."""

    steers: bool = False
    take: int = -1
    shown: int = 0
    heard: float = field(default_factory=time.monotonic)
    lost_frames: int = 0
    sent_frames: int = 0
    gone: str | None = None
    """Why they are to be sent away, once that is so."""

    def __post_init__(self) -> None:
        self._outbox: deque[str | bytes] = deque()
        self._frames = 0
        self._filled = asyncio.Event()

    def tell(self, event: str) -> None:
        """Queue an event."""
        if len(self._outbox) - self._frames >= QUEUED_EVENTS:
            self.dismiss("this connection is too slow")
            return
        self._outbox.append(event)
        self._filled.set()

    def show(self, frame: bytes) -> None:
        """Queue a frame; the oldest that still waits goes if there are too many."""
        if self._frames >= QUEUED_FRAMES:
            oldest = next(place for place, item in enumerate(self._outbox) if isinstance(item, bytes))
            del self._outbox[oldest]
            self._frames -= 1
            self.lost_frames += 1
        self._outbox.append(frame)
        self._frames += 1
        self._filled.set()

    def forget_frames(self) -> None:
        """Of a take that is over."""
        self._outbox = deque(item for item in self._outbox if isinstance(item, str))
        self._frames = 0

    def dismiss(self, reason: str) -> None:
        """Let the connection be closed, after what is queued."""
        self.gone = self.gone or reason
        self._filled.set()

    async def deliver(
        self, send_text: Callable[[str], Awaitable[None]], send: Callable[[bytes], Awaitable[None]]
    ) -> None:
        """Send what comes until the viewer is dismissed; as fast as the connection takes it."""
        while True:
            while self._outbox:
                item = self._outbox.popleft()
                if isinstance(item, bytes):
                    self._frames -= 1
                    self.sent_frames += 1
                    await send(item)
                else:
                    await send_text(item)
            if self.gone is not None:
                return
            self._filled.clear()
            await self._filled.wait()


@dataclass
class Rate:
    """How many messages a viewer may still send (a bucket that fills), and how many were sent beyond that."""

    left: float = MESSAGES_AT_ONCE
    excess: int = 0
    at: float = field(default_factory=time.monotonic)

    def admits(self) -> bool:
        """Whether the message that has come now is within the rate."""
        now = time.monotonic()
        self.left = min(MESSAGES_AT_ONCE, self.left + (now - self.at) * MESSAGES_A_SECOND)
        self.at = now
        if self.left >= 1:
            self.left -= 1
            return True
        self.excess += 1
        return False

    @property
    def is_hopeless(self) -> bool:
        return self.excess > EXCESS_MESSAGES
