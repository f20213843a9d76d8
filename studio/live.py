"""A viewer's connection: from its hello, through a session or a place in the line, until one side ends it.

Whatever comes that is no message of the protocol is answered with a sentence; only who talks too much is sent away.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from studio.house import House
from studio.keeper import ENDED
from studio.protocol import (
    VERSION,
    At,
    Bye,
    ClientMessage,
    Hello,
    Pause,
    Prompt,
    Restart,
    Save,
    Step,
    event,
    parse,
)
from studio.room import Room
from studio.security import Doorkeeper
from studio.settings import HELLO_S, VIEWERS_A_SESSION
from studio.viewer import Rate, Viewer
from utils.errors import InputError

logger = logging.getLogger(__name__)

POLICY_VIOLATION, NORMAL, TRY_LATER = 1008, 1000, 1013


class Connection:
    """One WebSocket, from its opening to its end."""

    def __init__(self, socket: WebSocket, house: House, keeper: Doorkeeper) -> None:
        self._socket = socket
        self._house = house
        self._doorkeeper = keeper
        self._viewer = Viewer()
        self._rate = Rate()
        self._room: Room | None = None
        self._code = NORMAL

    async def run(self) -> None:
        """Serve it until one side ends it."""
        await self._socket.accept()
        sending = asyncio.create_task(self._send())
        living = asyncio.create_task(self._live())
        try:
            await asyncio.wait((sending, living), return_when=asyncio.FIRST_COMPLETED)
            if living.done():
                await asyncio.wait((sending,), timeout=HELLO_S)  # what is queued, the reason above all
        finally:
            for task in (sending, living):
                task.cancel()
            await asyncio.gather(sending, living, return_exceptions=True)
            if self._room is not None:
                self._house.metrics.lost_frames.inc(self._viewer.lost_frames)
                self._room.leave(self._viewer)
            await self._close()

    async def _send(self) -> None:
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            await self._viewer.deliver(self._socket.send_text, self._socket.send_bytes)

    async def _close(self) -> None:
        if self._socket.application_state is WebSocketState.CONNECTED:
            reason = (self._viewer.gone or "").encode("utf-8")[:120].decode("utf-8", "ignore")
            with contextlib.suppress(RuntimeError, WebSocketDisconnect):
                await self._socket.close(self._code, reason)

    async def _live(self) -> None:
        try:
            join = await asyncio.wait_for(self._introduced(), HELLO_S)
            if join is not None:
                await self._serve(join)
        except asyncio.TimeoutError:
            self._dismiss("the first message must be a hello, within 10 seconds", POLICY_VIOLATION)
        except WebSocketDisconnect:
            self._viewer.dismiss("gone")

    async def _introduced(self) -> Hello | None:
        """The viewer's first message, or None if that is a reason to send them away."""
        try:
            hello = parse(await self._received())
            if not isinstance(hello, Hello):
                raise InputError("type: the first message must be a hello")
        except InputError as error:
            self._dismiss(str(error), POLICY_VIOLATION)
            return None
        if not self._doorkeeper.knows(hello.token):
            self._dismiss("token: it is missing or wrong; open the address that the server printed", POLICY_VIOLATION)
            return None
        return hello

    def _dismiss(self, reason: str, code: int) -> None:
        self._code = code
        self._viewer.tell(event("error", message=reason, fatal=True))
        self._viewer.dismiss(reason)

    async def _serve(self, hello: Hello) -> None:
        if not self._house.loaded.is_set():
            self._viewer.tell(event("loading"))
        entering = asyncio.create_task(self._enter(hello.join))
        try:
            while not self._rate.is_hopeless:
                received = await self._received()
                if not self._rate.admits():
                    if self._rate.excess % 50 == 1:
                        self._refuse("messages: these are too many at once; some are left out")
                    continue
                self._answer(received)
            self._dismiss("messages: these were too many at once", POLICY_VIOLATION)
        finally:
            entering.cancel()
            await asyncio.gather(entering, return_exceptions=True)

    async def _enter(self, join: str | None) -> None:
        """Get a session, when there is one to be had."""
        await self._house.loaded.wait()
        self._viewer.tell(self._welcome())
        lobby = self._house.parts.lobby
        try:
            self._room = await lobby.enter(self._viewer, join)
            if len(self._room.viewers) > VIEWERS_A_SESSION:
                raise InputError(f"this session has {VIEWERS_A_SESSION} viewers already")
        except InputError as error:
            self._dismiss(str(error), TRY_LATER)

    def _welcome(self) -> str:
        config, workshop = self._house.config, self._house.parts.workshop
        height, width = config.pixel_size
        policies = [
            {"name": policy.name, "label": policy.label, "dial": policy.dial}
            for policy in workshop.choices.policies.values()
        ]
        return event(
            "welcome",
            version=VERSION,
            fps=config.fps,
            width=width,
            height=height,
            first_block=workshop.first_frames,
            block=workshop.block_frames,
            model=config.model_folder.name,
            policies=policies,
            examples=self._house.examples,
        )

    async def _received(self) -> str | bytes:
        """The next message. Raises WebSocketDisconnect if none comes any more."""
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", NORMAL))
        text: str | None = message.get("text")
        return message.get("bytes", b"") if text is None else text

    def _answer(self, received: str | bytes) -> None:
        """Do what a message says, or say why not."""
        number = None
        try:
            message = parse(received)
            number = message.id if isinstance(message, Prompt) else None
            self._obey(message)
        except InputError as error:
            self._refuse(str(error), number)

    def _refuse(self, reason: str, number: int | None = None) -> None:
        self._house.metrics.refused.inc()
        self._viewer.tell(event("error", message=reason, id=number))

    def _obey(self, message: ClientMessage) -> None:
        """Do what a viewer says. Raises InputError for what is not theirs to say, or cannot be done."""
        room = self._room
        if room is None and isinstance(message, Bye):
            self._viewer.dismiss(ENDED)
            return
        if room is None:
            raise InputError("there is no session yet; wait for your turn")
        if isinstance(message, At):
            room.heard(self._viewer, message)
            return
        if isinstance(message, Hello):
            raise InputError("type: hello has been said")
        if not self._viewer.steers:
            raise InputError("this link is for watching; only who opened the session steers it")
        match message:
            case Prompt():
                room.prompt(message)
            case Pause(on):
                room.pause(on)
            case Step():
                room.step()
            case Restart():
                room.restart(self._house.parts.workshop.choices.changed(room.choice, message))
            case Save():
                self._house.parts.keeper.save(room)
            case Bye():
                room.close(ENDED)
