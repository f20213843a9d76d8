"""Files that are whole or absent.

A file is written under a hidden *partial* name beside its final one and renamed when it is complete, so whatever
carries the final name can be trusted, also after a power cut or SIGKILL. Partial names carry the machine and the
process that writes them, so that what a killed process left behind can be told from work in progress. Operating-system
errors that the user can mend (a full disk, a folder that cannot be written) become InputError here. This file does not
know what the files hold.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import platform
import re
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from utils.errors import InputError
from utils.user_paths import look, unreadable

logger = logging.getLogger(__name__)

_PARTIAL = re.compile(r"^\..*\.(?P<host>[0-9a-f]{6})\.(?P<pid>[0-9]+)\.partial(\.[A-Za-z0-9]+)?$", re.DOTALL)
_NAME_BYTES = 255  # the longest name that common file systems take
_FOREIGN_AGE_S = 24 * 3600.0  # another machine's process cannot be asked whether it lives; none writes a file this long
_FULL = frozenset({errno.ENOSPC, errno.EFBIG, *([errno.EDQUOT] if hasattr(errno, "EDQUOT") else [])})


def _host_tag() -> str:
    """Six hex digits of the machine's name: process numbers mean something on one machine only."""
    return hashlib.blake2b(platform.node().encode("utf-8", "surrogatepass"), digest_size=3).hexdigest()


def partial_path(path: Path) -> Path:
    """The hidden name beside `path` under which this process writes it; a stem too long for it is hashed."""
    tail = f".{_host_tag()}.{os.getpid()}.partial{path.suffix}"
    stem = path.stem
    if len(f".{stem}{tail}".encode("utf-8", "surrogatepass")) > _NAME_BYTES:
        stem = hashlib.blake2b(stem.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return path.with_name(f".{stem}{tail}")


def disk_full(path: Path) -> InputError:
    """The error for a disk (or a quota, or a limit on the size of a file) that has no room for `path`."""
    return InputError(f"{path}: no space left to write it. Free some space there or choose another output folder.")


def write_error(path: Path, error: OSError) -> InputError:
    """What the user can do about an operating-system error that came up while `path` was written."""
    if error.errno in _FULL:
        return disk_full(path)
    reason = error.strerror or str(error)
    return InputError(f"{path}: cannot be written ({reason}). Choose a folder that exists and that you may write to.")


def create_partial(path: Path) -> Path:
    """Create the empty partial file of `path`, so that a folder that cannot be written is found out at once.

    Raises InputError if `path` is a folder or the file cannot be created.
    """
    return create_beside(path, partial_path(path))


def ensure_writable(path: Path) -> None:
    """Prove that the file `path` can be written, without touching what is there. Raises InputError."""
    create_partial(path).unlink()


def create_beside(path: Path, beside: Path) -> Path:
    """Create the empty file `beside`, which is to become `path`; returns it. Raises InputError as create_partial."""
    try:
        if path.is_dir():
            raise InputError(f"{path}: is a folder, so no file can be written there. Move it or choose another name.")
        beside.write_bytes(b"")
    except OSError as error:
        raise write_error(path, error) from error
    return beside


def commit_partial(partial: Path, path: Path) -> None:
    """Give a complete partial file its final name, after its bytes have reached the disk.

    Raises InputError if either fails; the partial file is then still there.
    """
    try:
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise write_error(path, error) from error


def remove_partial(partial: Path) -> None:
    """Remove an unfinished file after a failure, which is what the user is to hear of, not that this fails too."""
    try:
        partial.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s: is unfinished and cannot be deleted (%s)", partial, error.strerror)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A partial file to write to; it becomes `path` if the context ends without an exception, and else goes.

    Raises InputError if the file cannot be created or put in its place.
    """
    partial = partial_path(path)
    try:
        create_partial(path)
        yield partial
        commit_partial(partial, path)
    except BaseException:
        remove_partial(partial)
        raise


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `content` (text as UTF-8) to `path`: the old file or the whole new one is there at any time, never a part.

    Raises InputError if the folder cannot be written or the disk is full; no partial file is left then.
    """
    with atomic_write(path) as partial:
        write_partial(partial, path, content)


def write_together(contents: Mapping[Path, str | bytes]) -> None:
    """Write files that belong together: what can go wrong does so before the first of the old ones is touched. The last
    file is gone until all others are new; where it is, they belong together.

    Raises InputError as write_atomic; the old files are still there then.
    """
    partials = {path: partial_path(path) for path in contents}
    try:
        for path, content in contents.items():
            write_partial(create_partial(path), path, content)
        last = path
        try:
            last.unlink(missing_ok=True)
        except OSError as error:
            raise write_error(last, error) from error
        for path, partial in partials.items():
            commit_partial(partial, path)
    except BaseException:
        for partial in partials.values():
            remove_partial(partial)
        raise


def write_partial(partial: Path, path: Path, content: str | bytes) -> None:
    """Write `content` (text as UTF-8) to the file that is to become `path`. Raises InputError if the disk is full."""
    try:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    except OSError as error:
        raise write_error(path, error) from error


def ensure_writable_folder(path: Path, field: str) -> None:
    """Create the folder `path` if it is missing, and prove by making a file that it can be written.

    The mode bits are not asked: root passes them on a read-only file system too. `field` is the setting that named the
    folder, for the message of the InputError that is raised if it cannot be used.
    """
    remedy = f"Set {field} to a folder that you may write to."
    found = look(path, field, "folder")
    if found is not None and not stat.S_ISDIR(found.st_mode):
        raise InputError(f"{field}: {path} is a file, not a folder. {remedy}")
    probe = path / f".write-test.{_host_tag()}.{os.getpid()}.partial"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{field}: the folder {path} cannot be written ({reason}). {remedy}") from error


def _is_alive(pid: int) -> bool:
    """Whether a process of this number runs on this machine (POSIX)."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # it runs, as another user
    return True


def _is_stale(entry: Path, host: str, pid: int) -> bool:
    """Whether nobody writes the partial file any more."""
    if host != _host_tag():
        return time.time() - entry.stat().st_mtime > _FOREIGN_AGE_S
    if sys.platform == "win32":
        # Signal 0 is Ctrl-C there. Windows refuses to delete a file that is open, which is the same test.
        return pid != os.getpid()
    return not _is_alive(pid)


def remove_stale_partials(folder: Path) -> list[Path]:
    """Delete the partial files in `folder` whose process no longer runs; returns those that were deleted.

    Partial files of another machine (a shared file system) go when they have not changed for a day. Work in progress,
    this process's own included, and all other files are left alone. Raises InputError if `folder` is not a folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: is not a folder, so there is nothing to tidy up. Check the path.")
    removed = []
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise unreadable(folder, error, what="folder") from error
    for entry in entries:
        match = _PARTIAL.match(entry.name)
        if match is None:
            continue
        try:
            if _is_stale(entry, match["host"], int(match["pid"])):
                entry.unlink()
                removed.append(entry)
        except FileNotFoundError:
            logger.debug("%s was removed by another process", entry)
        except OSError as error:
            logger.warning("%s is left over from a stopped run and cannot be deleted (%s)", entry, error.strerror)
    return removed
