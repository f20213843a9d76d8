"""A lock on a file that one process may hold alone, or several together.

The operating system keeps it and lets go of it when a process ends in whatever way, so a lock is never left over from a
process that is gone, and no process number has to be looked up. It holds between machines where their shared file
system passes locks on (NFS does).
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import final

from utils.errors import InputError
from utils.files import write_error

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

_HELD = frozenset({errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES})
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})


@final
class FileLock:
    """The lock of the file `path`, which it creates; free again when its `with` block or its process ends.

    Where locks cannot be had (Windows, some network file systems) one warning says so, and everybody gets it.
    """

    def __init__(self, path: Path, busy: str) -> None:
        """`busy` is the message if another process holds it: what is in use, and the remedy. Who holds it is added."""
        self._path = path
        self._busy = busy
        self._file: int | None = None

    def __enter__(self) -> FileLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def alone(self, holder: str) -> None:
        """Hold it alone, and leave `holder` in the file for others to read. Raises InputError if anybody holds it."""
        self._take(shared=False)
        assert self._file is not None
        try:
            os.ftruncate(self._file, 0)
            os.lseek(self._file, 0, os.SEEK_SET)
            os.write(self._file, holder.encode("utf-8"))
        except OSError as error:
            raise write_error(self._path, error) from error

    def together(self) -> None:
        """Hold it together with others, also in place of holding it alone. Raises InputError if one holds it alone."""
        self._take(shared=True)

    def holder(self) -> str:
        """What the last one that held it alone left in the file."""
        return self._path.read_text(encoding="utf-8") if self._path.exists() else ""

    def _take(self, shared: bool) -> None:
        try:
            if self._file is None:
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        except OSError as error:
            raise write_error(self._path, error) from error
        if sys.platform == "win32":
            logger.warning("%s: there are no locks on Windows; see that only one run works there", self._path)
            return
        try:
            fcntl.flock(self._file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                raise InputError(
                    f"{self._busy} It is held by {self.holder() or 'a run that has only begun'}."
                ) from error
            if error.errno not in _NO_LOCKS:
                raise write_error(self._path, error) from error
            logger.warning(
                "%s: no locks on this file system (%s); see that only one run works there", self._path, error.strerror
            )
