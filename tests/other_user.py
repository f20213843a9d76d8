"""Calls as a user who may not do everything: the tests often run as root, to whom no folder is closed."""

from __future__ import annotations

import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NOBODY = 65534


@contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that every user may look into, unlike pytest's own; it goes in the end."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        for path in folder.glob("**"):
            path.chmod(0o755)
        shutil.rmtree(folder)


def as_nobody(call: Callable[[], object]) -> str:
    """What `call` returns, as text, in a child process that is not root; of an exception the last line."""
    if not hasattr(os, "fork"):
        pytest.skip("needs POSIX processes")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            said = str(call())
        except BaseException as error:
            said = "".join(traceback.format_exception_only(error))
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as file:
        said = file.read()
    os.waitpid(child, 0)
    return said.strip()
