"""How the commands of this program begin and end: what they print, what they answer to signals, their exit status.

    if __name__ == "__main__":
        sys.exit(run(main))

The status is the command's own, 2 for input that must be mended, said in one message on stderr, 130 when it is
interrupted, or 141 when nobody reads any more what it prints. Before that `utils.interrupts` answers Ctrl-C.
"""

from __future__ import annotations

import atexit
import logging
import os
import shlex
import signal
import sys
import threading
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from types import FrameType
from typing import NoReturn

from utils.errors import InputError, ToldElsewhere, quoted, readable
from utils.interrupts import INTERRUPTED, answer_at_once, by_exception

LOG_FORMAT = "%(levelname)s: %(message)s"
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the first's former name
NOBODY_READS = 128 + 13  # the status of a program that SIGPIPE has ended
PACKAGES = ("studio", "pipeline", "dummy", "wan", "utils")  # whose progress is told; of others, warnings alone


class ReadableFormatter(logging.Formatter):
    """Log lines as messages of errors: escaped, and not endless."""

    def format(self, record: logging.LogRecord) -> str:
        return readable(super().format(record))


_must_end_at_once = False


def run(program: Callable[[], int], modules: Sequence[str] = (), log_format: str | None = LOG_FORMAT) -> int:
    """The status of `program`, see above; `modules` are the large ones that it needs, imported before it. Without a
    `log_format` it sets up its logging itself. It does not return if the program has asked for `end_at_once`."""
    global _must_end_at_once
    _must_end_at_once = False
    try:
        status = _status(program, modules, log_format)
    except Exception:
        if not _must_end_at_once:
            raise
        sys.excepthook(*sys.exc_info())
        status = 1
    if _must_end_at_once:
        end(status)
    return status


def end_at_once() -> None:
    """Let this process end when the program that `run` runs has ended, without taking the interpreter down first.

    A thread of a library that lets go of a tensor in that time needs the interpreter, and C++ ends the process with
    status 134 in place of its own (PyTorch's issue 38228). Threads of gloo do, now and then, even when their process
    group has been destroyed.
    """
    global _must_end_at_once
    _must_end_at_once = True


def end(status: int) -> NoReturn:
    """End this process so, here."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(status)


def _status(program: Callable[[], int], modules: Sequence[str], log_format: str | None) -> int:
    show_any_text()
    let_memory_grow()
    if log_format is not None:
        _show_progress(log_format)
    try:
        with _signals_as_interrupts(modules):
            status = program()
            sys.stdout.flush()
            return status
    except ToldElsewhere:
        return 2
    except InputError as error:
        return _refused(str(error))
    except OSError as error:
        if error.filename is None:  # not about a file
            return _unprinted(error)
        reason = error.strerror or type(error).__name__
        return _refused(readable(f"{error.filename}: {reason}. Check the path and its permissions."))
    except KeyboardInterrupt:
        sys.stderr.write(f"{INTERRUPTED}\n")
        return 130


def _unprinted(error: OSError) -> int:
    """The status if what the program prints goes nowhere: a full disk, or a pipe whose reader has left, which is no
    fault of anybody's and has the status of SIGPIPE. Raises the error if it comes of anything else."""
    try:
        sys.stdout.write("\n")  # without a buffer nothing is left to be flushed
        sys.stdout.flush()
    except OSError as lost:
        with suppress(OSError), open(os.devnull, "wb") as nowhere:  # else the interpreter tries to print it once more
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        if isinstance(lost, BrokenPipeError):
            return NOBODY_READS
        return _refused(f"stdout: cannot be written ({lost.strerror}). Free some space, or print elsewhere.")
    raise error


def let_memory_grow() -> None:
    """Let PyTorch's allocator for GPUs lengthen what it has in place of adding blocks, between which gaps stay: with
    them it holds half as much again. Not where the user has said how it is to work."""
    if sys.platform == "linux" and not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        os.environ[ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"


def _show_progress(log_format: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(ReadableFormatter(log_format))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for name in PACKAGES:
        logging.getLogger(name).setLevel(logging.INFO)


def _refused(message: str) -> int:
    sys.stderr.write(f"error: {message}\n")
    return 2


def parse(parser: ArgumentParser, argv: Sequence[str] | None) -> Namespace:
    """The parser's answer. Settings given as options, as other programs take them, are answered with how to write them;
    as the parser does, this ends the program with status 2."""
    show_any_text()
    given = list(sys.argv[1:] if argv is None else argv)
    # Not parse_args: that takes settings in one stretch only, and refuses `seed=1 --dry_run resolution=480`.
    arguments, unknown = parser.parse_known_intermixed_args(given)
    if unknown:
        named, settings = " ".join(map(quoted, unknown)), " ".join(_as_settings(given, unknown))
        hint = f"; settings are written without dashes: {settings}" if settings else ""
        parser.error(readable(f"unrecognized arguments: {named}{hint}"))
    return arguments


def count(text: str, least: int = 1) -> int:
    """The type of an option that takes a whole number from `least` on."""
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= least):
        raise ArgumentTypeError(f"expected a whole number from {least} on, got {quoted(text)}")
    return int(text)


def count_or_zero(text: str) -> int:
    """The type of an option that takes a whole number, of which 0 is one."""
    return count(text, 0)


def _as_settings(given: Sequence[str], unknown: Sequence[str]) -> Iterator[str]:
    """`--output_folder X --use_ema` as `output_folder=X` and `use_ema=true`."""
    for place, word in enumerate(given):
        key, equals, value = word.removeprefix("--").partition("=")
        if word not in unknown or not word.startswith("--") or not key:
            continue
        following = given[place + 1] if place + 1 < len(given) else "--"
        if not equals:
            value = "true" if following.startswith("--") or "=" in following else following
        yield shlex.quote(f"{key.replace('-', '_')}={value}")


def show_any_text() -> None:
    """Let stdout and stderr escape what the console's encoding lacks, where Python would end the program."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # absent where something else stands in their place
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _signals_as_interrupts(modules: Sequence[str]) -> Iterator[None]:
    """Import `modules`, then let Ctrl-C and a polite kill end the context as exceptions do: unfinished files go."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers; then they are its business
        return
    answer_at_once()
    for name in modules:
        import_module(name)
    by_exception()
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)
