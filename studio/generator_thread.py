"""The one thread in which blocks are made: those of live sessions first, in the order in which they were asked for."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class GeneratorThread:
    """Runs what it is given, one thing at a time; a live session's work goes before work that can wait."""

    def __init__(self) -> None:
        self._live: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._patient: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="generator", daemon=True)
        self._thread.start()

    async def run(self, work: Callable[[], T], patient: bool = False) -> T:
        """The result of `work`, which may be a block, or what opens or closes a session."""
        future: Future[T] = Future()
        with self._changed:
            if self._closed:
                raise asyncio.CancelledError
            (self._patient if patient else self._live).append((future, work))
            self._changed.notify()
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Finish what is at work and drop the rest."""
        with self._changed:
            self._closed = True
            for future, _ in (*self._live, *self._patient):
                future.cancel()
            self._live.clear()
            self._patient.clear()
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._live or self._patient)
                if self._closed:
                    return
                future, work = (self._live or self._patient).popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:  # whoever asked for it raises it
                future.set_exception(error)
            del future, work
