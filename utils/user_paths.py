"""Files and folders that a user names: found, looked at and read, with one message for whatever keeps them from it.

A name may be a prompt, a named pipe, a folder of somebody else, or nothing at all; without a look at it first each of
them ends a program in a way of its own, or never. Messages begin with the setting or option that holds the name. This
file does not know what the files hold; `utils.files` writes them.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from pathlib import Path

from utils.errors import InputError, quoted

_TEXT_BYTES = 256 << 20  # more is no text that anybody wrote: a checkpoint, or a file that never ends
_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR})
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def user_path(value: str, setting: str) -> Path:
    """`value` as a path, with `~` and `~name` expanded; whether anything is there is not asked.

    Raises InputError for an empty name, an unknown user, and characters that no name can have.
    """
    if not value.strip():
        raise InputError(f"{setting}: the path is empty; give the path of a file or folder")
    bad = re.search(r"[\0\r\n]", value)
    if bad is not None:
        what = "a NUL character" if bad[0] == "\0" else "a line break"
        raise InputError(f"{setting}: {quoted(value)} holds {what}, so it is no path; remove it")
    try:
        os.fsencode(value)
        return Path(value).expanduser()
    except UnicodeEncodeError as error:
        reason = f"characters that file names here ({error.encoding}) cannot have"
        raise InputError(f"{setting}: {quoted(value)} holds {reason}; rename it") from error
    except RuntimeError as error:
        user = value.partition("/")[0]
        raise InputError(f"{setting}: {quoted(value)}: there is no user {user[1:]!r}; write the folder out") from error


def look(path: Path, setting: str = "", what: str = "file") -> os.stat_result | None:
    """What is at `path`, or None if nothing is. Raises InputError if the system does not say."""
    try:
        return path.stat()
    except ValueError:  # characters that no name can have
        return None
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise unreadable(path, error, setting, what) from error


def exists(path: Path, setting: str = "") -> bool:
    """Whether something is at `path`. Raises InputError if the system does not say."""
    return look(path, setting) is not None


def is_folder(path: Path, setting: str = "") -> bool:
    """Whether a folder is at `path`. Raises InputError if the system does not say."""
    found = look(path, setting)
    return found is not None and stat.S_ISDIR(found.st_mode)


def is_file(path: Path, setting: str = "") -> bool:
    """Whether an ordinary file is at `path`. Raises InputError if the system does not say."""
    found = look(path, setting)
    return found is not None and stat.S_ISREG(found.st_mode)


def unreadable(path: Path, error: OSError, setting: str = "", what: str = "file") -> InputError:
    """What the user can do about an operating-system error that came up while `path` was looked at or read."""
    where, reason = _where(path, setting), error.strerror or str(error)
    if error.errno == errno.ENAMETOOLONG:
        where = f"{setting}: {quoted(str(path))}" if setting else quoted(str(path))
        return InputError(f"{where} is too long for the name of a {what}. Give the path of one; text belongs into it.")
    return InputError(f"{where}: the {what} cannot be read ({reason}). Check the path and its permissions.")


def require_file(path: Path, setting: str, what: str = "file") -> os.stat_result:
    """What is at `path`. Raises InputError unless it is an ordinary file that can be read; `what` is the message's noun
    for it."""
    where = _where(path, setting)
    found = look(path, setting, what)
    if found is None:
        raise InputError(f"{where}: there is no such {what}. Check the path{start_of_relative(path)}.")
    kind = stat.S_IFMT(found.st_mode)
    if kind == stat.S_IFDIR:
        raise InputError(f"{where}: is a folder, not {_a(what)}. Give the path of the file in it.")
    if kind != stat.S_IFREG:
        raise InputError(f"{where}: is {_KINDS.get(kind, 'something else')}, not {_a(what)}. Give an ordinary file.")
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise unreadable(path, error, setting, what) from error
    return found


def require_searchable(path: Path, setting: str) -> None:
    """Raises InputError if something is at `path` in which the system does not look names up."""
    try:
        os.stat(os.path.join(path, os.curdir))
    except OSError as error:
        if error.errno == errno.ENOTDIR and exists(path):
            raise InputError(f"{setting}: {path} is a file, not a folder. Give a folder.") from error
        if error.errno not in _ABSENT:
            raise unreadable(path, error, setting, "folder") from error


def require_folder(path: Path, setting: str) -> None:
    """Raises InputError unless the folder at `path` can be listed."""
    try:
        os.listdir(path)
    except OSError as error:
        raise unreadable(path, error, setting, "folder") from error


def read_bytes(path: Path, setting: str, what: str) -> bytes:
    """The whole of a file of text. Raises InputError as `require_file`, and if it is far too large for that."""
    size = require_file(path, setting, what).st_size
    try:
        with path.open("rb") as file:
            data = b"" if size > _TEXT_BYTES else file.read(_TEXT_BYTES + 1)  # the system's own files have no size
    except OSError as error:
        raise unreadable(path, error, setting, what) from error
    if max(size, len(data)) > _TEXT_BYTES:
        raise InputError(f"{_where(path, setting)}: holds more than {_TEXT_BYTES >> 20} MiB, so it is no {what}.")
    return data


def read_text(path: Path, setting: str, what: str) -> str:
    """A file of UTF-8 text, without a byte-order mark at its beginning.

    Raises InputError as `read_bytes`, and for other bytes, whose place it gives.
    """
    data = read_bytes(path, setting, what)
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{_where(path, setting)}: is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start} "
            f"(line {line}) does not belong there. Save the file as UTF-8."
        ) from error


def read_json(path: Path, setting: str, what: str) -> object:
    """What a JSON file holds. Raises InputError as `read_text`, and if it is no JSON."""
    try:
        content: object = json.loads(read_text(path, setting, what))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{_where(path, setting)}: is not a JSON file ({error}). Give a {what}.") from error
    return content


def start_of_relative(path: Path) -> str:
    """For a message on a path that leads nowhere: where it starts, if that is the current folder."""
    return "" if path.is_absolute() else f"; relative paths start from {Path.cwd()}"


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _where(path: Path, setting: str) -> str:
    return f"{setting}: {path}" if setting else f"{path}"
