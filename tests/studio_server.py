"""A studio with the small trained model in a thread of the test's process, and a client that speaks its protocol."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from websockets.sync.client import ClientConnection, connect

from dummy.calibration.measured import Calibration, Subject
from pipeline import Pipeline
from pipeline.config.config import InferenceConfig, load_config
from studio.house import House, examples_of
from studio.protocol import HEADER
from studio.serving import server_of
from studio.settings import StudioSettings
from wan.attention.head_group import Retention

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "shapes_studio.yaml"
CALIBRATION = ROOT / "checkpoints" / "shapes" / "calibration.safetensors"
PATIENCE_S = 90.0


def shapes_config(*overrides: str) -> InferenceConfig:
    """configs/shapes_studio.yaml, whatever folder the test runs in."""
    files = [f"model_root={ROOT / 'checkpoints'}", f"data_path={ROOT / 'prompts' / 'shapes_studio.txt'}"]
    return load_config(CONFIG, [*files, *overrides])


def small_calibration(path: Path) -> Path:
    """A calibration for videos of 48 x 32 pixels, of random errors that fall with the frames that a head keeps."""
    kept = [Retention(sink, recent) for sink in (0, 1) for recent in range(7)]
    scale = torch.rand(1, 1, 4, 6, 1, generator=torch.Generator().manual_seed(0))
    errors = scale / torch.tensor([1.0 + one.sink + one.recent for one in kept])
    subject = Subject(4, 6, 32, 4, 6, 3, 21, "none")
    Calibration(tuple(kept), errors, torch.ones(1, 1, 4, 6), (1,), ("clean",), ("A ball.",), subject).save(path)
    return path


def until(condition: Callable[[], Any], what: str = "it") -> Any:
    """What the condition returns once that is true."""
    ends = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < ends, f"{what} has not come about"
        time.sleep(0.01)
    return found


@dataclass
class Studio:
    """A running server."""

    house: House
    port: int
    loop: asyncio.AbstractEventLoop

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def visit(self, hello: bool = True, **fields: object) -> Iterator[Visitor]:
        """A client's connection, which has said hello with these fields."""
        headers = fields.pop("headers", None)
        address, options = (
            f"ws://127.0.0.1:{self.port}/ws",
            {"max_size": None, "compression": None, "close_timeout": 0.5},
        )
        with connect(address, additional_headers=headers, **options) as ws:
            visitor = Visitor(ws)
            if hello:
                visitor.say("hello", **fields)
            yield visitor

    def fetch(self, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        """Status and body of a request; names of headers with _ for -."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(f"{self.url}{path}", body, named, method=method)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def end_sessions(self) -> None:
        rooms = self.house.parts.lobby.rooms

        def ended() -> bool:
            for room in list(rooms.values()):  # who was in the line may have one only now
                self.loop.call_soon_threadsafe(room.close, "the test is over")
            return not rooms and not self.house.connections

        until(ended, "the end of all sessions")

    def json(self, path: str, method: str = "GET", **content: object) -> Any:
        """The answer to a request with a JSON body, if there is content."""
        body = json.dumps(content).encode() if content else None
        return json.loads(self.fetch(path, method, body, content_type="application/json")[1])


@dataclass
class Visitor:
    """What a client has heard: events by kind, and frames as (take, block, frame, scene)."""

    ws: ClientConnection
    events: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    frames: list[tuple[int, int, int, int]] = field(default_factory=list)
    pictures: list[bytes] = field(default_factory=list)
    reports: bool = True

    def say(self, kind: str, **fields: object) -> None:
        self.ws.send(json.dumps({"type": kind, **fields}))

    def hear(self) -> dict[str, Any] | None:
        """Take the next message; an event is returned."""
        message = self.ws.recv(PATIENCE_S)
        if isinstance(message, bytes):
            _, _, *place = HEADER.unpack_from(message)
            take, block, frame, scene = place
            self.frames.append((take, block, frame, scene))
            self.pictures.append(message[HEADER.size :])
            if self.reports and frame % 3 == 2:  # of each block the last one too
                self.say("at", take=take, frame=frame + 1)
            return None
        event: dict[str, Any] = json.loads(message)
        self.events.setdefault(event["type"], []).append(event)
        return event

    def wait_for(self, kind: str, **fields: object) -> dict[str, Any]:
        """The next event of that kind with these fields."""
        ends = time.monotonic() + PATIENCE_S
        while True:
            event = self.hear()
            if event is not None and event["type"] == kind and fields.items() <= event.items():
                return event
            assert time.monotonic() < ends, f"no {kind} {fields} has come, but {self.events.get('error')}"

    def wait_for_frames(self, count: int, take: int | None = None) -> None:
        """Until there have been so many (of that take)."""
        ends = time.monotonic() + PATIENCE_S
        while sum(take in (None, frame[0]) for frame in self.frames) < count:
            assert time.monotonic() < ends, f"{count} frames of take {take} have not come"
            self.hear()


@contextmanager
def running(pipeline: Pipeline, folder: Path, **settings: Any) -> Iterator[Studio]:
    """A server of this pipeline's, which writes to `folder`."""
    config = replace(pipeline.config, output_folder=str(folder))
    options = StudioSettings(**{"port": 0, **settings})
    listener = socket.create_server((options.host, 0))
    ready: threading.Event = threading.Event()
    made: list[Studio] = []

    async def serve() -> None:
        house = House(config, options, examples_of(config), lambda: pipeline)

        def end() -> None:
            server.should_exit = True

        server = server_of(house, end)
        made.append(Studio(house, listener.getsockname()[1], asyncio.get_running_loop()))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        stop = asyncio.create_task(asyncio.to_thread(stopped.wait))
        ready.set()
        await asyncio.wait((serving, stop), return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        await serving

    stopped = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        ready.wait(PATIENCE_S)
        until(lambda: made[0].house.loaded.is_set() or made[0].house.failure, "the model")
        assert made[0].house.failure is None, made[0].house.failure
        yield made[0]
    finally:
        stopped.set()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
