"""Who gets a session: as many as there are caches, then a line, in which all see their places."""

from __future__ import annotations

import asyncio
import contextlib
import time

from studio.keeper import ABSENT, STOPPING, Keeper
from studio.protocol import event
from studio.room import Room
from studio.viewer import Viewer
from studio.workshop import Workshop
from utils.errors import InputError

_LONGEST_LINE = 100


class Lobby:
    """All sessions and the line before them."""

    def __init__(self, workshop: Workshop, keeper: Keeper, prompt: str) -> None:
        """`prompt`: what a new video begins with."""
        self.rooms: dict[str, Room] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._line: dict[Viewer, asyncio.Future[None]] = {}  # in order of arrival
        self._workshop = workshop
        self._keeper = keeper
        self._prompt = prompt
        self._lost = 0

    async def enter(self, viewer: Viewer, join: str | None) -> Room:
        """The viewer's session: the one whose key they have, or a new one as soon as there is room for it.

        Raises InputError if the session that they want to watch is over, or the line is too long.
        """
        if join is not None:
            room, viewer.steers = self._find(join)
            if room is not None:
                room.join(viewer)
                return room
            viewer.tell(event("notice", message="that session is over; this is a new one"))
        viewer.steers = True
        if len(self.rooms) + len(self._line) >= self._workshop.settings.max_sessions:
            await self._wait(viewer)
        room = self._open()
        room.join(viewer)
        return room

    def _find(self, key: str) -> tuple[Room | None, bool]:
        """The room of that key, and whether it is the one that steers."""
        for room in self.rooms.values():
            if room.closing is None and key in (room.key, room.watch_key):
                return room, key == room.key
        return None, True

    async def _wait(self, viewer: Viewer) -> None:
        if len(self._line) >= _LONGEST_LINE:
            raise InputError(f"all sessions are taken and {_LONGEST_LINE} visitors wait; come back later")
        turn = self._line[viewer] = asyncio.get_running_loop().create_future()
        self._tell_places()
        try:
            await turn
        except asyncio.CancelledError:
            del self._line[viewer]
            self._tell_places()
            self._call_next()
            raise
        del self._line[viewer]
        self._tell_places()

    def _tell_places(self) -> None:
        self._workshop.metrics.waiting.set(len(self._line))
        for place, viewer in enumerate(self._line, 1):
            viewer.tell(event("waiting", place=place, of=len(self._line)))

    def _call_next(self) -> None:
        """Let those at the front of the line have the sessions that are free."""
        free = self._workshop.settings.max_sessions - len(self.rooms)
        called = [turn for turn in self._line.values() if turn.done()]
        for turn in [turn for turn in self._line.values() if not turn.done()][: max(free - len(called), 0)]:
            turn.set_result(None)

    def _open(self) -> Room:
        room = Room(self._workshop, self._workshop.choices.first(self._prompt), self._keeper.put_away)
        self.rooms[room.key] = room
        self._workshop.metrics.sessions.set(len(self.rooms))
        task = asyncio.create_task(self._live(room))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return room

    async def _live(self, room: Room) -> None:
        await room.run()
        del self.rooms[room.key]
        for viewer in room.viewers:
            viewer.dismiss(room.closing or "")
        self._workshop.metrics.sessions.set(len(self.rooms))
        self._call_next()

    def tick(self) -> None:
        """Once a second: numbers for viewers, and an end to sessions that nobody steers any more."""
        metrics, now = self._workshop.metrics, time.monotonic()
        for room in self.rooms.values():
            room.tell_numbers()
            if room.alone_since is not None and now - room.alone_since > self._workshop.settings.absence_s:
                room.close(ABSENT)
        metrics.resident.set(self._workshop.memory()["resident"] or 0)

    async def close(self) -> None:
        """End all sessions and the line."""
        for viewer in self._line:
            viewer.dismiss(STOPPING)
        for room in self.rooms.values():
            room.close(STOPPING)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*self._tasks)
