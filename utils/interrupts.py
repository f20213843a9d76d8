"""Ctrl-C while modules are imported, which takes seconds: one line and status 130, where Python prints a traceback.

Nothing is begun by then, so the process may end on the spot; later on KeyboardInterrupt lets files be tidied up.
Commands import this file first: it needs next to nothing itself.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

INTERRUPTED = "interrupted; what is finished is kept, what is unfinished is removed"


def before_a_module_runs() -> None:
    """For the beginning of a package: `answer_at_once` if it holds the command of `python -m`."""
    if sys.argv[:1] == ["-m"]:  # what Python puts there until it has found the module
        answer_at_once()


def answer_at_once() -> None:
    """Let Ctrl-C end the process, in the middle of whatever it is doing, until `by_exception`."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, or somebody else's
        signal.signal(signal.SIGINT, _end)


def by_exception() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(signum: int, frame: FrameType | None) -> None:
    os.write(2, f"{INTERRUPTED}\n".encode())
    os._exit(130)
