"""What goes over the WebSocket. Clients send JSON texts, each an object with a `type`; the server sends JSON texts and,
for every frame, a binary message: HEADER and the picture.

The messages of clients are the dataclasses of `MESSAGES`; fields and their meaning are in docs/studio.md. A viewer's
own words are data: no field names a file.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass

from studio.settings import MESSAGE_CHARS, PROMPT_CHARS
from utils.config import build
from utils.errors import InputError, brief, quoted
from utils.prompts import clean_line

VERSION = 1
JPEG = 1  # the kind of picture

HEADER = struct.Struct("!BBHIII")  # version, kind of picture, take, block, pixel frame and scene, all counted from 0

_MOST_COUNT = 2**32 - 1


@dataclass(frozen=True)
class Hello:
    """The first message. `join`: the key (steers) or the watch key (looks on) of a session that there is."""

    version: int = VERSION
    token: str | None = None
    join: str | None = None

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise InputError(f"version: this server speaks {VERSION}, not {self.version}; load the page anew")


@dataclass(frozen=True)
class Prompt:
    """A new prompt, from the next block on; `id` comes back with its scene."""

    text: str
    id: int = 0

    def __post_init__(self) -> None:
        _check_count("id", self.id)
        object.__setattr__(self, "text", checked_prompt(self.text, "text"))


@dataclass(frozen=True)
class At:
    """So many frames of the take have been shown."""

    take: int
    frame: int

    def __post_init__(self) -> None:
        _check_count("take", self.take)
        _check_count("frame", self.frame)


@dataclass(frozen=True)
class Pause:
    """Stop, or go on."""

    on: bool = True


@dataclass(frozen=True)
class Step:
    """Make one block of a session that is paused."""


@dataclass(frozen=True)
class Restart:
    """A new video; what is left out is as it was, the first prompt too."""

    prompt: str | None = None
    seed: int | None = None
    policy: str | None = None
    frames_per_head: float | None = None
    global_sink: bool | None = None

    def __post_init__(self) -> None:
        if self.prompt is not None:
            object.__setattr__(self, "prompt", checked_prompt(self.prompt, "prompt"))
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise InputError(f"seed: must be from 0 to 2**63 - 1, got {self.seed}")


@dataclass(frozen=True)
class Save:
    """Keep the video so far as a file, with what makes it again."""


@dataclass(frozen=True)
class Bye:
    """End the session now."""


ClientMessage = Hello | Prompt | At | Pause | Step | Restart | Save | Bye
MESSAGES: dict[str, type[ClientMessage]] = {
    **{"hello": Hello, "prompt": Prompt, "at": At, "pause": Pause, "step": Step},
    **{"restart": Restart, "save": Save, "bye": Bye},
}


def parse(text: str | bytes) -> ClientMessage:
    """A client's message. Raises InputError with a sentence for anything that is none."""
    if isinstance(text, bytes):
        raise InputError(f"message: {len(text)} bytes of binary data; messages are JSON texts")
    if len(text) > MESSAGE_CHARS:
        raise InputError(f"message: {len(text)} characters are too many; {MESSAGE_CHARS} at most")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"message: is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"message: expected an object with a type, got {brief(content)}")
    kind = content.pop("type", None)
    if not isinstance(kind, str) or kind not in MESSAGES:
        raise InputError(f"type: {brief(kind)} is none of {', '.join(MESSAGES)}")
    return build(MESSAGES[kind], content)


def checked_prompt(text: str, field: str) -> str:
    """The prompt on one line, as a file of storyboards gives it back. Raises InputError for what cannot be one."""
    if len(text) > PROMPT_CHARS:
        raise InputError(f"{field}: {len(text)} characters are too many; {PROMPT_CHARS} at most")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise InputError(f"{field}: {quoted(text)} holds half a character; remove it")
    cleaned = clean_line(" ".join(text.split()))
    if not cleaned:
        raise InputError(f"{field}: it is empty; write what is to be seen")
    return cleaned


def frame_message(take: int, block: int, frame: int, scene: int, picture: bytes) -> bytes:
    """The binary message of one frame."""
    return HEADER.pack(VERSION, JPEG, take % 2**16, block, frame, scene) + picture


def event(kind: str, **fields: object) -> str:
    """A text message of the server."""
    return json.dumps({"type": kind, **fields}, separators=(",", ":"))


def _check_count(field: str, value: int) -> None:
    if not 0 <= value <= _MOST_COUNT:
        raise InputError(f"{field}: must be from 0 to {_MOST_COUNT}, got {value}")
