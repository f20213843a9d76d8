"""The lock of a run that one process begins and several may work on.

The operating system keeps locks and lets go of them when a process ends in whatever way, so none is left over from a
process that is gone, and no process number has to be looked up. They hold between machines where their shared file
system passes locks on (NFS does).
"""

from __future__ import annotations

import logging
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import final

import filelock

from utils.errors import InputError
from utils.files import write_atomic, write_error

logger = logging.getLogger(__name__)


@final
class RunLock:
    """The lock of the file `path`, and one beside it for each further process; free again, and its file gone, when its
    `with` block ends, and free when its process does.

    Where locks cannot be had (some network file systems) one warning says so, and everybody gets it.
    """

    def __init__(self, path: Path, busy: str) -> None:
        """`busy` is the message if another run holds it: what is in use, and the remedy. Who holds it is added."""
        self._path = path
        self._busy = busy
        self._held = ExitStack()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def begin(self, holder: str) -> None:
        """Take the run, and leave `holder` for others to read. Raises InputError if anybody works on one."""
        self._take(self._path, self._held)
        with ExitStack() as others:
            for member in self._path.parent.glob(f"{self._path.name}.[0-9]*"):
                self._take(member, others)
        write_atomic(self._holder_file, holder)
        self._held.callback(self._holder_file.unlink, missing_ok=True)  # before the lock is free for others

    def join(self, number: int) -> None:
        """Work on a run that another process has begun, as its process `number`. Raises InputError."""
        self._take(self._path.with_name(f"{self._path.name}.{number}"), self._held)

    def holder(self) -> str:
        """What the one that began the run has left, or one that was killed before."""
        return self._holder_file.read_text(encoding="utf-8") if self._holder_file.exists() else ""

    @property
    def _holder_file(self) -> Path:
        return self._path.with_name(f"{self._path.name}.holder")

    def _take(self, path: Path, held: ExitStack) -> None:
        """Until `held` is closed."""
        lock = filelock.FileLock(path, timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            self._held.close()
            raise InputError(
                f"{self._busy} It is held by {self.holder() or 'a run that has only begun or is about to end'}."
            ) from error
        except NotImplementedError:
            logger.warning("%s: no locks on this file system; see that only one run works there", path)
        except OSError as error:
            raise write_error(path, error) from error
        held.callback(lock.release)
        held.callback(_remove, path)


def _remove(path: Path) -> None:
    """A lock's file, while the lock is held: whoever waits for it sees that its file is gone, and makes another."""
    with suppress(OSError):  # on Windows it is in use, and goes with the lock
        path.unlink()
