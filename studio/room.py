"""A visitor's session and those who watch it: what they say goes in, blocks come out and go to all of them.

All state belongs to the event loop; only making a block, and turning it into pictures, happens in other threads. The
rule by which blocks become due is in studio.pace, what is kept for Save in studio.take.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace

from studio.choices import Choice
from studio.pace import Pace
from studio.protocol import At, Prompt, event
from studio.settings import PROMPTS_A_TAKE
from studio.showing import Part, Showing
from studio.viewer import Viewer
from studio.workshop import Workshop
from utils.errors import InputError

logger = logging.getLogger(__name__)

_KEY_BYTES = 18
_STEPS_AHEAD = 8


class Room:
    """`run` is its life; everything else may be called at any time from the event loop."""

    def __init__(self, workshop: Workshop, choice: Choice, put_away: Callable[[Showing, str | None], None]) -> None:
        """`put_away` gets each take that is over, with the reason if the session ends with it."""
        self.key, self.watch_key = secrets.token_urlsafe(_KEY_BYTES), secrets.token_urlsafe(_KEY_BYTES)
        self.viewers: set[Viewer] = set()
        self.paused = False
        self.alone_since: float | None = time.monotonic()  # since when nobody steers
        self.showing: Showing | None = None
        self.closing: str | None = None  # why it ends
        self.choice = choice  # what the video is made with, or is going to be, and its first prompt
        self._workshop = workshop
        self._put_away = put_away
        self._afresh = True  # a new take is wanted
        self._steps = 0
        self._takes = 0
        self._to_encode: Prompt | None = None
        self._encoding: asyncio.Task[None] | None = None
        self._prompted: dict[str, tuple[int, float]] = {}  # encoded, not yet on: number and time of arrival, by text
        self._wake = asyncio.Event()
        self._pace = Pace(workshop.pipeline.config.fps, workshop.block_frames)

    # what viewers do

    def join(self, viewer: Viewer) -> None:
        self.viewers.add(viewer)
        if viewer.steers:
            self.alone_since = None
        key = self.key if viewer.steers else None
        viewer.tell(event("session", key=key, watch=self.watch_key, steers=viewer.steers, paused=self.paused))
        if self.showing is not None:
            self.showing.introduce(viewer)
        self._tell_viewers()
        self._wake.set()

    def leave(self, viewer: Viewer) -> None:
        self.viewers.discard(viewer)
        if self.alone_since is None and not any(one.steers for one in self.viewers):
            self.alone_since = time.monotonic()
        self._tell_viewers()
        self._wake.set()

    def heard(self, viewer: Viewer, at: At) -> None:
        """How far a viewer is; of frames that there are."""
        made = self.showing.made if self.showing is not None and self.showing.number == at.take else 0
        viewer.take, viewer.shown, viewer.heard = at.take, min(at.frame, made), time.monotonic()
        self._wake.set()

    def prompt(self, prompt: Prompt) -> None:
        """Let it be encoded and take effect with the next block; of several that come meanwhile the last counts.

        Raises InputError if the video has had too many.
        """
        if self.showing is None or self._afresh:
            self.restart(replace(self.choice, prompt=prompt.text))
            return
        if len(self.showing.scenes) >= PROMPTS_A_TAKE:
            raise InputError(f"prompt: a video has {PROMPTS_A_TAKE} at most; restart it")
        self._to_encode = prompt
        if self._encoding is None or self._encoding.done():
            self._encoding = asyncio.create_task(self._encode())

    async def _encode(self) -> None:
        while (prompt := self._to_encode) is not None:
            self._to_encode, showing, came = None, self.showing, time.monotonic()
            if showing is None:
                self.prompt(prompt)
                continue
            try:
                await self._workshop.encode(showing.session, prompt.text)
            except InputError as error:
                if showing is self.showing:  # else a new take has overtaken it
                    self.tell(event("error", message=str(error), id=prompt.id))
                continue
            if showing is self.showing and not self._afresh:
                self._prompted[prompt.text] = prompt.id, came
                self.tell(event("prompted", id=prompt.id))

    def pause(self, on: bool) -> None:
        self.paused, self._steps = on, 0
        self.tell(event("paused", on=on))
        self._wake.set()

    def step(self) -> None:
        """Raises InputError unless the session is paused."""
        if not self.paused:
            raise InputError("step: the video is running; pause it first")
        self._steps = min(self._steps + 1, _STEPS_AHEAD)
        self._wake.set()

    def restart(self, choice: Choice) -> None:
        self.choice, self._afresh = choice, True
        if self.paused:
            self.pause(False)
        self._wake.set()

    def close(self, reason: str) -> None:
        """Let the session end; viewers hear the reason."""
        self.closing = self.closing or reason
        self._wake.set()

    # its life

    async def run(self) -> None:
        """Make takes until the room is closed."""
        await self._guarded(self._make_takes())
        await self._guarded(self._end_take())
        self.tell(event("ended", reason=self.closing))

    async def _guarded(self, work: Coroutine[None, None, None]) -> None:
        """What goes wrong ends this session, and no other."""
        try:
            await work
        except Exception as error:
            if self._workshop.pipeline.fault is not None:
                self.close("the server has failed and stops; what was made is saved when it starts again")
            elif isinstance(error, InputError):
                self.close(str(error))
            else:
                logger.exception("a session has failed")
                self.close("this session has failed; the server's log says how")

    async def _make_takes(self) -> None:
        while self.closing is None:
            await self._end_take()
            await self._make_take()

    async def _make_take(self) -> None:
        self._afresh, choice = False, self.choice
        self._prompted.clear()
        opened = time.monotonic()
        session, take = await self._workshop.open(choice)
        self.showing = showing = Showing(self._takes, choice, session, take, self._workshop, opened)
        self._takes += 1
        for viewer in self.viewers if not self._afresh else ():  # else yet another take is wanted already
            viewer.forget_frames()
            showing.introduce(viewer)
        while await self._until_due():
            due = time.monotonic()
            made = await self._workshop.make(session)
            await showing.settled()  # so no more than one block is on its way while another is made
            part = showing.add(made, self._prompted, self.viewers)
            showing.under_way = asyncio.create_task(self._publish(showing, part, due))
        await showing.settled()

    async def _until_due(self) -> bool:
        """Wait for the next block's time; False if the take is over."""
        assert self.showing is not None
        while True:
            self._wake.clear()
            if self._afresh or self.closing is not None:
                return False
            if self.paused and self._steps:
                self._steps -= 1
                return True
            if not self.paused and self._pace.is_due(self.showing.made, self.showing.number, self.viewers):
                return True
            await self._wake.wait()

    async def _publish(self, showing: Showing, part: Part, due: float) -> None:
        frames = await showing.publish(part, self.viewers)
        seconds = time.monotonic() - due
        self._pace.took(seconds)
        self._workshop.metrics.block_seconds.observe(seconds)
        await showing.record(part, frames)

    async def _end_take(self) -> None:
        showing, self.showing = self.showing, None
        if showing is not None:
            await showing.end()
            self._put_away(showing, self.closing)

    # what viewers hear

    def tell(self, message: str) -> None:
        for viewer in self.viewers:
            viewer.tell(message)

    def tell_numbers(self) -> None:
        if self.showing is not None and self.viewers:
            self.tell(self.showing.numbers(self._pace, self.viewers).event(self.showing.number))

    def _tell_viewers(self) -> None:
        steering = sum(viewer.steers for viewer in self.viewers)
        self.tell(event("viewers", count=len(self.viewers), steering=steering))
