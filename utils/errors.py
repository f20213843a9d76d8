"""Errors that are the user's to mend, and how their messages stay readable.

Every message names the field or file, the value that was found, and what to do. Commands print the message alone and
exit with status 2 (utils/command.py); a traceback is reserved for faults of the program itself. Whatever a user can
name may be of any length and hold any character: `InputError` shortens and escapes its message, `quoted` a value.
"""

from __future__ import annotations

import itertools
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import cast

ELLIPSIS = "..."
VALUE_CHARS = 100  # of a value in a message
FEW = 12  # keys or entries in a message
_INT_BITS = 64
_WORD_CHARS = 400  # of what holds no white space, such as a path
_LINE_CHARS = 3000
_CONTROL = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # they move the cursor, are invisible, or cannot be encoded


class InputError(ValueError):
    """Input (a file, a setting, a prompt) that cannot be used; the message says which, why, and the remedy.

    The message may have several lines; it is shortened and escaped as `readable` does.
    """

    def __init__(self, message: str) -> None:
        super().__init__(readable(message))


def shown(text: object, limit: int = 300) -> str:
    """`text` for a message: what does not print is escaped, and of more than `limit` characters the middle is cut."""
    whole = str(text)
    if len(whole) > limit:
        head = (limit - len(ELLIPSIS)) * 2 // 3
        whole = f"{whole[:head]}{ELLIPSIS}{whole[len(whole) - (limit - len(ELLIPSIS) - head) :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in whole)


class ToldElsewhere(InputError):
    """Another process of the run has told the user already."""


def quoted(text: str, limit: int = VALUE_CHARS) -> str:
    """A text for a message: in quotation marks, escaped, and cut after `limit` characters, which the end then says."""
    if len(text) <= limit:
        return repr(text)
    return f"{text[:limit]!r}... ({len(text)} characters)"


def readable(message: str) -> str:
    """The message with control and invisible characters escaped, except for the ends of lines, and what is endless cut
    in its middle: words of more than 400 characters, lines of more than 3000."""
    return "\n".join(_readable_line(line) for line in message.split("\n"))


def _readable_line(line: str) -> str:
    escaped = line
    if not line.isprintable():  # nothing below would change it
        escaped = "".join(_escaped(char) if unicodedata.category(char) in _CONTROL else char for char in line)
    words = re.sub(rf"\S{{{_WORD_CHARS + 1},}}", lambda match: _cut(match[0], _WORD_CHARS), escaped)
    return _cut(words, _LINE_CHARS)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}...({len(text) - 2 * half} characters left out)...{text[-half:]}"


def shown_key(key: str) -> str:
    """A key for a message: in quotation marks where it is no plain word."""
    return key if key.isidentifier() and len(key) <= VALUE_CHARS else quoted(key)


def brief(value: object, depth: int = 2) -> str:
    """The value as Python writes it, without what is long or deep in it."""
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, Mapping):
        pairs = (f"{brief(key)}: {brief(item, depth - 1)}" for key, item in value.items())
        return f"{{{_few(depth, pairs)}}}"
    if isinstance(value, (list, tuple)):
        return f"[{_few(depth, (brief(item, depth - 1) for item in value))}]"
    if is_endless(value):
        return f"a number of {math.ceil(cast(int, value).bit_length() * math.log10(2))} digits"
    return str(value)


def _few(depth: int, texts: Iterator[str]) -> str:
    shown_texts = list(itertools.islice(texts, FEW + 1)) if depth else ["..."]
    return ", ".join(shown_texts[:FEW]) + (", ..." if len(shown_texts) > FEW else "")


def is_endless(value: object) -> bool:
    """Whether it is an integer that no setting can mean; the longest of them Python refuses to print."""
    return isinstance(value, int) and value.bit_length() > _INT_BITS


def require_range(name: str, value: int, least: int, most: int, unit: str = "") -> None:
    """Raises InputError unless the setting `name` is from `least` to `most`, beyond which nothing is meant."""
    of = f" {unit}" if unit else ""
    if value < least:
        raise InputError(f"{name}: must be {least} or more{of}, got {value}")
    if value > most:
        raise InputError(f"{name}: must be {most} or less{of}, got {value}")
