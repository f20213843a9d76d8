"""Work that goes on in a thread while its items are still being made: in order, with bounded room, errors passed on.

This file does not know what the items are.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE_S = 10.0  # how long an interrupted consumer may take to finish the item it has before it is made to stop


class Background(Generic[T]):
    """A context manager that calls `consume` in a thread of its own for every item that is put, one after the other.

        with Background(writer.write, capacity=2, stop=writer.kill) as background:
            for item in items:
                background.put(item)

    `put` waits while `capacity` items are waiting. What `consume` raises is raised by the next `put`, or when the block
    ends, and nothing is consumed after it. The block's end waits for all items; if it ends with an exception
    (KeyboardInterrupt too), items that wait are dropped, and `stop` is called, from another thread than `consume`, if
    the one at work does not come to its end. The thread is gone when the block is left.

    If both sides fail, the failure that came first is raised, since the other may follow from it, and the other is
    logged; but what asks for the end (KeyboardInterrupt, SystemExit) is always passed on.
    """

    def __init__(self, consume: Callable[[T], object], capacity: int, stop: Callable[[], None]) -> None:
        assert capacity >= 1
        self._consume = consume
        self._capacity = capacity
        self._stop = stop
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="background", daemon=True)

    def __enter__(self) -> Background[T]:
        self._thread.start()
        return self

    def put(self, item: T) -> None:
        """Hand over an item; raises what `consume` has raised for an earlier one."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or len(self._items) < self._capacity)
            self._check()
            self._items.append(item)
            self._changed.notify_all()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._items) or self._closed)
                if not self._items:
                    return
                item = self._items.popleft()
                self._changed.notify_all()
            try:
                self._consume(item)
            except BaseException as error:  # whatever it is: the other thread raises it
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return

    def _close(self, drop: bool) -> None:
        with self._changed:
            self._closed = True
            if drop:
                self._items.clear()
            self._changed.notify_all()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for what is left, or, after an exception, for the item at work alone."""
        earlier = self._error  # before the consumer is made to stop, which it may answer with an error
        self._close(drop=kind is not None)
        try:
            self._thread.join(None if kind is None else PATIENCE_S)
        except BaseException:  # an interruption while all was well
            self._close(drop=True)
            self._end()
            raise
        later = self._error
        if error is None:
            self._check()
            return
        self._end()
        if earlier is not None and earlier is not error and isinstance(error, Exception):
            logger.warning("this failed as well: %s", _one_line(error))
            raise earlier
        if later is not None and later is not error:
            logger.warning("this failed as well: %s", _one_line(later))

    def _end(self) -> None:
        if self._thread.is_alive():
            self._stop()
            self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            logger.warning("a background thread does not end")


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
