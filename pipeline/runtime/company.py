"""Whether the processes that make a video together are all there, which each hears at once, whatever it is at.

A collective of NCCL whose other side is gone never ends, and a process that waits for its user is in none. So there are
threads that listen, over gloo on any machine: the first process to every other one, those to the first. Whoever leaves
says how, and who is gone without a word was killed, or its machine is lost.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum

import torch
import torch.distributed as dist

from wan.attention.exchange import HeadExchange

GRACE_S = 7.0  # for an orderly end, once a process is lost; then it is a sudden one
_LAST_WORDS_S = 1.0


class Leaving(IntEnum):
    """How a process leaves the others."""

    DONE = 0
    TOLD = 1  # for a reason that it has told the user
    BEREFT = 2  # since it has lost another one


class LostProcess(RuntimeError):
    """Another process is gone. `process` is its rank, if that is known; `tells`: this one is to tell the user."""

    def __init__(self, process: int | None, tells: bool) -> None:
        named = "another process" if process is None else f"process {process}"
        super().__init__(
            f"parallel: {named} is gone, without which the others cannot go on. What it has said, if anything, tells "
            "why; what is finished is kept, and a new start does the rest."
        )
        self.tells = tells


class Company:
    """The other processes of an exchange. The first that is lost becomes the `fault` of the exchange; if this process
    does not end by itself then, in some seconds it is made to."""

    def __init__(self, exchange: HeadExchange, group: dist.ProcessGroup, first: int = 0) -> None:
        """`group`: gloo, nobody else's, of the exchange's processes, whose first is number `first` of the run."""
        self._exchange = exchange
        self._group = group
        self._first = first
        self._others = range(1, exchange.ranks) if exchange.rank == 0 else range(1)
        self._lock = threading.Lock()
        self._said: set[int] = set()
        self._loss: LostProcess | None = None
        self._over = False  # the first has left, in order; whoever follows it has nothing more to do
        self._heard = threading.Event()
        self._end = threading.Timer(GRACE_S, self._end_at_once)
        self._end.daemon = True
        self._listeners = [_begin(self._listen, other) for other in self._others]

    def _listen(self, other: int) -> None:
        word = torch.empty(1, dtype=torch.uint8)
        try:
            self._group.recv([word], other, 0).wait()
        except RuntimeError:
            # The first one tells; of its own death the next.
            self._lose(LostProcess(self._first + other, tells=self._exchange.rank == (1 if other == 0 else 0)))
            return
        self._say(other, Leaving.DONE)  # for which it waits
        self._over = other == 0
        if word == Leaving.TOLD:
            self._lose(LostProcess(self._first + other, tells=False))
        elif word == Leaving.BEREFT and not self._heard.wait(_LAST_WORDS_S / 2):  # of whom it has lost
            self._lose(LostProcess(None, tells=self._exchange.rank == 0))

    def _lose(self, lost: LostProcess) -> None:
        with self._lock:
            if self._loss is not None:
                return
            self._exchange.fault = self._exchange.fault or lost
            self._loss = lost
        self._heard.set()
        self._end.start()

    def _end_at_once(self) -> None:
        """Whatever this process waits for, it does not come."""
        assert self._loss is not None
        if self._loss.tells:
            sys.stderr.write(f"error: {self._loss}\n")
        os._exit(2)

    def _say(self, other: int, how: Leaving) -> None:
        with self._lock:
            if other in self._said:
                return
            self._said.add(other)
        with suppress(RuntimeError):  # it is gone already
            self._group.send([torch.tensor([how], dtype=torch.uint8)], other, 0).wait()

    def loss(self) -> LostProcess | None:
        """The process that is lost, if one is; also of what has just happened."""
        self._heard.wait(_LAST_WORDS_S)
        return self._loss or (LostProcess(self._first, tells=False) if self._over else None)

    def leave(self, how: Leaving) -> None:
        """Say goodbye to all."""
        ends = time.monotonic() + _LAST_WORDS_S
        for thread in [*(_begin(self._say, other, how) for other in self._others), *self._listeners]:
            thread.join(max(0.0, ends - time.monotonic()))
        self._end.cancel()


def _begin(work: Callable[..., None], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=work, args=arguments, name="company", daemon=True)
    thread.start()
    return thread
