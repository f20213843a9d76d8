"""Videos that are to stay: saves that viewers ask for, and what is done with takes that are over.

A take whose session ends because the server does is saved then, as far as there is time; what is left, or was left by
a server that was killed, is saved when the next one starts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path

from studio.protocol import event
from studio.room import Room
from studio.saving import KINDS, NAME, Saved, write_save, write_settings, write_video
from studio.showing import Showing
from studio.take import Recorded, left_over
from studio.workshop import Workshop
from utils.errors import InputError
from utils.user_paths import is_file

logger = logging.getLogger(__name__)

Progress = Callable[[int], None]

STOPPING = "the server stops; what was made is saved"
ENDED = "the session was ended"
ABSENT = "nobody was there for a while, so the session was freed"
_LAST_S = 8.0  # for saves, when the server ends
_TELL_S = 0.25  # between words of progress


class Keeper:
    """Saves one video at a time."""

    def __init__(self, workshop: Workshop) -> None:
        self._workshop = workshop
        self._tasks: set[asyncio.Task[None]] = set()

    def save(self, room: Room) -> None:
        """Begin to save what the room has shown so far. Raises InputError if there is nothing, or a save under way."""
        showing = room.showing
        if showing is None or not showing.made:
            raise InputError("save: there is nothing yet; wait for the first block")
        if showing.saves:
            raise InputError("save: one is under way; wait until it is done")
        task = self._begin(self._save(room, showing))
        showing.saves.add(task)
        task.add_done_callback(showing.saves.discard)

    async def _save(self, room: Room, showing: Showing) -> None:
        await showing.settled()
        loop, told, recorded = asyncio.get_running_loop(), 0.0, showing.take.recorded()

        def progress(done: int) -> None:
            nonlocal told
            if time.monotonic() - told > _TELL_S:
                told = time.monotonic()
                loop.call_soon_threadsafe(room.tell, event("saving", done=done, of=recorded.frames))

        try:
            saved = await self._workshop.file(lambda: self._write(recorded, progress))
        except InputError as error:
            room.tell(event("error", message=str(error)))
            return
        self._workshop.metrics.saves.inc()
        room.tell(event("saved", **saved.as_event()))

    def _write(self, recorded: Recorded, progress: Progress) -> Saved:
        return write_save(self._workshop.pipeline, recorded, self._workshop.folders.saved, progress)

    def put_away(self, showing: Showing, reason: str | None) -> None:
        """A take is over, and with it the session if there is a `reason`."""
        if reason != STOPPING and self._workshop.pipeline.fault is None:  # else it is saved with the server's end
            self._begin(self._drop(showing, reason not in (None, ENDED)))

    async def _drop(self, showing: Showing, note: bool) -> None:
        """Remove a take, after its saves; `note`: but let it be made again, for those who come back too late."""
        await asyncio.gather(*showing.saves)
        recorded = showing.take.recorded()
        if note and recorded.blocks:
            try:
                folder = self._workshop.folders.saved
                await self._workshop.file(lambda: write_settings(self._workshop.pipeline, recorded, folder))
            except InputError as error:
                logger.info("%s: %s", recorded.name, error)
        await self._workshop.file(recorded.remove)

    def path(self, name: str, kind: str) -> Path | None:
        """The file of a save that a client asks for; None unless it is one."""
        if NAME.fullmatch(name) is None or kind not in KINDS:
            return None
        path = self._workshop.folders.saved / f"{name}.{kind}"
        return path if is_file(path) else None

    async def recover(self, seconds: float | None = None) -> None:
        """Save the takes that nobody makes any more, for so many `seconds` at most."""
        ends = None if seconds is None else time.monotonic() + seconds

        def progress(done: int) -> None:
            if ends is not None and time.monotonic() > ends:
                raise InputError("the server has no time left; the next start saves it")

        def recover(folder: Path) -> None:
            try:
                recorded = left_over(folder)
                if recorded.blocks:
                    self._write_what_can_be(recorded, progress)
            except InputError as error:
                logger.warning("%s: %s", folder, error)
                return
            recorded.remove()

        for folder in sorted(self._workshop.folders.takes.iterdir()):
            await self._workshop.file(partial(recover, folder))

    def _write_what_can_be(self, recorded: Recorded, progress: Progress) -> None:
        """The video, and what makes it again unless it is too short for that."""
        pipeline, folder = self._workshop.pipeline, self._workshop.folders.saved
        try:
            write_settings(pipeline, recorded, folder)
        except InputError as error:
            logger.info("%s: %s", recorded.name, error)
        write_video(pipeline, recorded, folder, progress)
        logger.info("%s: saved, %d frames", recorded.name, recorded.frames)

    async def finish(self) -> None:
        """The server ends: let saves under way end, and save the takes that it leaves."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_LAST_S)
        await self.recover(_LAST_S)

    def _begin(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
