"""The server as a process: one socket, one output folder, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import uvicorn

from pipeline import Pipeline
from pipeline.config.config import InferenceConfig
from studio.app import create_app
from studio.house import House, examples_of
from studio.settings import MESSAGE_BYTES, StudioSettings
from utils.errors import InputError
from utils.files import ensure_writable_folder
from utils.lock import RunLock
from utils.user_paths import user_path

logger = logging.getLogger(__name__)

_BACKLOG = 128
_PATIENCE_S = 3  # for requests that are being answered when the server ends


class Server(uvicorn.Server):
    """Signals ask it to end; they do not end the process once more after that, as uvicorn's own answer does."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread hears of signals
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class StillLoading(Exception):
    """The server has ended in the middle of loading, from which no thread can be called back."""


class Place(NamedTuple):
    """What a server needs before there is a model: nobody else has its folder and its socket."""

    config: InferenceConfig
    settings: StudioSettings
    examples: list[str]
    listener: socket.socket


@contextmanager
def taken(config: InferenceConfig, settings: StudioSettings) -> Iterator[Place]:
    """The place of a server, free again when the context is left. Raises InputError if it cannot be had."""
    examples = examples_of(config)
    folder = user_path(config.output_folder, "output_folder")
    ensure_writable_folder(folder, "output_folder")
    busy = (
        f"output_folder: {folder} is in use by another studio. Set output_folder to another folder, or stop that one."
    )
    with RunLock(folder / ".studio.lock", busy) as lock:
        lock.begin(f"process {os.getpid()} on {platform.node()}")
        with listening(settings) as listener:
            yield Place(config, settings, examples, listener)


def serve(place: Place, load: Callable[[], Pipeline], show: bool = False) -> int:
    """Serve until a signal comes; returns the exit status. `load` makes the pipeline; `show`: in a browser.

    Raises InputError, what has brought processes that make blocks together out of step, and StillLoading.
    """
    return asyncio.run(_serve(place, load, show))


@contextmanager
def listening(settings: StudioSettings) -> Iterator[socket.socket]:
    """The socket, which is free again when the context is left. Raises InputError if it cannot be had."""
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise InputError(f"host: {settings.host} is no address of this machine ({error}); use 127.0.0.1") from error
    with listener:
        try:
            if sys.platform != "win32":  # there it would let two servers have one port
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except OSError as error:
            reason = f"{settings.port} on {settings.host} cannot be used ({error.strerror or error})"
            raise InputError(f"port: {reason}; give another with --port, or stop what uses it") from error
        yield listener


async def _serve(place: Place, load: Callable[[], Pipeline], show: bool) -> int:
    house = House(place.config, place.settings, place.examples, load)

    def end() -> None:
        server.should_exit = True

    server = server_of(house, end)
    address = address_of(place.settings, place.listener)
    print(f"The studio is at {address}", flush=True)
    if show:
        webbrowser.open(address)
    await server.serve(sockets=[place.listener])
    if house.failure is not None:
        raise house.failure
    if not house.loaded.is_set():
        raise StillLoading
    return 0


def server_of(house: House, on_failure: Callable[[], None]) -> Server:
    """`on_failure` is called if the model cannot be loaded, or nothing more can be made with it."""
    options = uvicorn.Config(
        create_app(house, on_failure),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_PATIENCE_S,
        ws="websockets-sansio",
        ws_max_size=MESSAGE_BYTES,
        ws_per_message_deflate=False,  # pictures are compressed already
    )
    return Server(options)


def address_of(settings: StudioSettings, listener: socket.socket) -> str:
    """What to open in a browser."""
    port = listener.getsockname()[1]
    name = settings.host if settings.host not in ("0.0.0.0", "::") else socket.gethostname()
    name = f"[{name}]" if ":" in name else name
    return f"http://{name}:{port}/" + (f"#token={settings.token}" if settings.token is not None else "")
