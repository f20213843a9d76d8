"""Processes that share the work of one run: which of them this one is, what its share is, what the first one decides.

The environment is torchrun's; without it a process is alone. Processes talk once, at the start, through torchrun's own
store, and there are no collectives: afterwards nobody waits for anybody, so a process that dies holds up no other. This
file does not know what the work is, and makes no use of the GPU. Processes stop when their launcher is gone.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from utils.errors import InputError, ToldElsewhere

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 600.0  # until all have begun: importing and listing a folder on a slow network disk take a while
LOOK_S = 1.0  # between looks at the launcher
TELL_S = 2.0  # in which the first process says why there is nothing to do
GRACE_S = 5.0  # for tidying up once it is gone

_OF_EACH_PROCESS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_OF_THE_STORE = ("MASTER_ADDR", "MASTER_PORT")


class Store(Protocol):
    """What is used of torch.distributed's stores."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes:
        """Waits until it is there."""

    def wait(self, keys: list[str]) -> None: ...


@dataclass(frozen=True)
class World:
    """This process among all of the run: number `rank` of `size`, and `local_rank` of `local_size` on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> World:
        """What torchrun says in RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; alone if there is no RANK.

        Raises InputError if only some of them are there, or they are no numbers that go together.
        """
        if "RANK" not in environment and "WORLD_SIZE" not in environment:
            return cls()
        rank, size, local_rank, local_size = (_number(environment, name) for name in _OF_EACH_PROCESS)
        if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
            raise InputError(
                f"RANK: {rank} of WORLD_SIZE {size}, LOCAL_RANK {local_rank} of LOCAL_WORLD_SIZE {local_size} do not "
                "go together. Start the processes with torchrun, which sets them."
            )
        if size > 1:
            _number(environment, "MASTER_PORT")
            _text(environment, "MASTER_ADDR")
        return cls(rank, size, local_rank, local_size)

    def share(self, count: int) -> range:
        """The items of `count` that are this process's: one stretch; all shares together are all items, each once.

        Shares differ by one item at most, and are empty where there are more processes than items.
        """
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def agree(self, decide: Callable[[], str], timeout_s: float = START_TIMEOUT_S) -> str:
        """What `decide` returns on the first process, on all of them. Call it once.

        If it raises InputError there, all raise it. Raises InputError too if the processes do not find each other
        within `timeout_s` seconds.
        """
        if self.size == 1:
            return decide()
        from torch.distributed import DistError
        from torch.distributed.rendezvous import rendezvous

        try:
            store: Store
            store, _, _ = next(rendezvous("env://", self.rank, self.size, timeout=timedelta(seconds=timeout_s)))
            return self._lead(store, decide) if self.rank == 0 else self._follow(store)
        except DistError as error:
            address = ":".join(os.environ[name] for name in _OF_THE_STORE)
            raise InputError(
                f"MASTER_ADDR: process {self.rank} of {self.size} lost the others at {address} while the run began "
                f"({str(error).splitlines()[0]}). If none of them says why it ended, see that all were started by the "
                "same torchrun command and can reach this address."
            ) from error

    def _lead(self, store: Store, decide: Callable[[], str]) -> str:
        refusal: InputError | None = None
        try:
            answer = decide()
        except InputError as error:
            answer, refusal = str(error), error
        store.set(_key("answer"), json.dumps({"text": answer, "refused": refusal is not None}))
        # This process may hold the store, so it stays until all have read.
        store.wait([_key(f"read by {rank}") for rank in range(1, self.size)])
        if refusal is not None:
            raise refusal
        return answer

    def _follow(self, store: Store) -> str:
        answer = json.loads(store.get(_key("answer")).decode("utf-8"))
        store.set(_key(f"read by {self.rank}"), "")
        if answer["refused"]:
            # When one process ends, its launcher ends the others, and with them the one that says why.
            time.sleep(TELL_S)
            raise ToldElsewhere(str(answer["text"]))
        return str(answer["text"])


def stop_with_launcher(environment: Mapping[str, str] = os.environ, grace_s: float = GRACE_S) -> None:
    """Let this process stop within seconds once torchrun, if that has started it, is gone. Call it in the main thread,
    as early as can be.

    torchrun ends its processes when it is asked to end, not when it is killed: they would go on unseen, and hold the
    GPUs. The end is that of a polite kill (SIGTERM), so that what is unfinished is removed, or, if the process does not
    come to it, sudden after `grace_s` seconds. Nothing happens on Windows, which does not say that a parent is gone.
    """
    if "TORCHELASTIC_RUN_ID" not in environment or sys.platform == "win32":
        return
    threading.Thread(target=_watch, args=(os.getppid(), grace_s), name="launcher", daemon=True).start()


def _watch(launcher: int, grace_s: float) -> None:
    while os.getppid() == launcher:
        time.sleep(LOOK_S)
    logger.error("torchrun (process %d), which started process %d, is gone, so this one stops", launcher, os.getpid())
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGTERM)  # to this thread: whatever it waits for, it hears of it
    time.sleep(grace_s)
    os._exit(130)


def _key(name: str) -> str:
    """torchrun's store may outlive a restart of the processes, whose answers are others."""
    return f"agree/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"


def _text(environment: Mapping[str, str], name: str) -> str:
    if not environment.get(name):
        raise InputError(
            f"{name}: not set in the environment, but RANK or WORLD_SIZE is. Start the processes with torchrun, which "
            "sets all of them, or unset those."
        )
    return environment[name]


def _number(environment: Mapping[str, str], name: str) -> int:
    text = _text(environment, name)
    if not text.isdecimal():
        raise InputError(f"{name}: {text!r} in the environment is no number. Start the processes with torchrun.")
    return int(text)
