"""Prompt files, storyboards, and file names made from prompts.

A prompt file holds one prompt a line; a storyboard file holds one JSON object a line. `output_stems` turns any list of
prompts into file names that are legal and different on every file system. This file does not know how text is encoded,
nor what is written under the names.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.errors import InputError

logger = logging.getLogger(__name__)

_STORYBOARD_KEYS = ("prompts", "switch_frame_indices")

_MAX_CHARS = 100
_MAX_BYTES = 180  # leaves room in the usual 255 for a sample number, suffixes and the marks of an unfinished file
_SLUG_CHARS = 40
_FORBIDDEN = frozenset('<>:"/\\|?*')  # on Windows; "/" everywhere
# Control, format, surrogate and private characters, line and paragraph separators: invisible or not storable.
_FORBIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]) *(\.|$)", re.IGNORECASE)


def _read_lines(path: Path, what: str) -> list[str]:
    """The lines of a UTF-8 text file, stripped; a byte-order mark is dropped. `what` the file should hold."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder, not a file of {what}. Give the path of the file in it.")
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file of {what}. Check the path.") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{path}: the file of {what} cannot be read ({reason}). Check its permissions.") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}: is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start} (line {line}) "
            "does not belong there. Save the file as UTF-8."
        ) from error
    # Not str.splitlines, which would also cut a prompt at characters such as U+2028.
    lines = re.split(r"\r\n|\n|\r", text.removeprefix("\ufeff"))
    if not lines[-1]:
        lines.pop()
    return [line.strip() for line in lines]


def _numbered_content(path: Path, what: str) -> list[tuple[int, str]]:
    """The lines that hold something, with their numbers from 1; one warning counts the others."""
    lines = _read_lines(path, what)
    content = [(number, line) for number, line in enumerate(lines, start=1) if line]
    if not content:
        raise InputError(f"{path}: holds no {what}, the file is empty or blank. Write one a line.")
    blank = len(lines) - len(content)
    if blank:
        logger.warning("%s: skipped %d blank line%s", path, blank, "" if blank == 1 else "s")
    return content


def read_prompts(path: Path) -> list[str]:
    """The prompts of a UTF-8 text file, one a line, without the white space around them; blank lines are skipped.

    Raises InputError if the file is missing, a folder, not UTF-8, or holds no prompt.
    """
    return [line for _, line in _numbered_content(path, "prompts")]


@dataclass(frozen=True)
class Storyboard:
    """Prompts that follow one another in one video, and the latent frames at which each but the first takes over.

    `switch_frames` is None where the storyboard leaves them to the configuration; else it is one shorter than `prompts`
    and ascends from 1 or more.
    """

    prompts: tuple[str, ...]
    switch_frames: tuple[int, ...] | None = None


def read_storyboards(path: Path) -> list[Storyboard]:
    """The storyboards of a jsonl file: `{"prompts": [...], "switch_frame_indices": [...]}` a line, the second optional.

    Raises InputError, which names the file and the line, for anything else.
    """
    return [_storyboard(f"{path}, line {number}", line) for number, line in _numbered_content(path, "storyboards")]


def _storyboard(where: str, line: str) -> Storyboard:
    try:
        record: object = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is not JSON ({error}). Write one object a line, on one line.") from error
    if not isinstance(record, dict):
        raise InputError(f'{where}: is a JSON {type(record).__name__}, not an object. Write {{"prompts": [...]}}.')
    for key in record:
        if key not in _STORYBOARD_KEYS:
            close = difflib.get_close_matches(key, _STORYBOARD_KEYS, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"Known keys: {', '.join(_STORYBOARD_KEYS)}."
            raise InputError(f"{where}: unknown key {key!r}. {hint}")
    prompts = _storyboard_prompts(where, record.get("prompts"))
    return Storyboard(prompts, _switch_frames(where, record.get("switch_frame_indices"), len(prompts)))


def _storyboard_prompts(where: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: prompts must be a list of at least one text, not {value!r}.")
    prompts = []
    for index, prompt in enumerate(value):
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f"{where}: prompts[{index}] must be a text that is not blank, not {prompt!r}.")
        if any("\ud800" <= char <= "\udfff" for char in prompt):
            raise InputError(f"{where}: prompts[{index}] holds half a character (\\ud800 to \\udfff). Remove it.")
        prompts.append(prompt.strip())
    return tuple(prompts)


def _switch_frames(where: str, value: object, num_prompts: int) -> tuple[int, ...] | None:
    if value is None:
        return None
    rule = f"{where}: switch_frame_indices must be a list of ascending whole numbers from 1 on, not {value!r}."
    if not isinstance(value, list):
        raise InputError(rule)
    frames = tuple(frame for frame in value if isinstance(frame, int) and not isinstance(frame, bool))
    if len(frames) != len(value) or any(late <= early for early, late in zip((0, *frames), frames, strict=False)):
        raise InputError(rule)
    if len(frames) != num_prompts - 1:
        raise InputError(
            f"{where}: {num_prompts} prompts need {num_prompts - 1} switch_frame_indices, not {len(frames)}: "
            "one for each prompt but the first."
        )
    return frames


def output_stems(prompts: Sequence[str], with_index: bool) -> list[str]:
    """A file name without suffix for each prompt, all different, also to file systems that ignore case or normalise.

    With index: `{index:03d}-{slug}`, the slug up to 40 letters and digits. Without: the prompt itself where that is a
    legal name of at most 100 characters and 180 bytes; else what can be kept of it and `-{8 hex digits}` of its
    BLAKE2b, which prompts that differ in case alone get too. Repetitions of a prompt get -2, -3 and so on.

    The names depend on the whole list and its order: make them from all prompts, also when only some are run.
    """
    if with_index:
        return [
            f"{index:03d}-{slug}" if (slug := _slug(prompt)) else f"{index:03d}" for index, prompt in enumerate(prompts)
        ]
    return _named_by_prompt(prompts)


def _slug(prompt: str) -> str:
    """Words of letters and digits (with their accents) joined by dashes, in lower case."""
    kept = "".join(
        char if unicodedata.category(char)[0] in "LMN" else " " for char in unicodedata.normalize("NFKC", prompt)
    )
    return unicodedata.normalize("NFC", "-".join(kept.lower().split())[:_SLUG_CHARS].rstrip("-"))


def _named_by_prompt(prompts: Sequence[str]) -> list[str]:
    bodies = {prompt: _safe_name(prompt) for prompt in prompts}  # in order of first appearance
    alike = Counter(_collision_key(body) for body in bodies.values())
    as_it_is = {
        prompt: body == unicodedata.normalize("NFC", prompt) and alike[_collision_key(body)] == 1
        for prompt, body in bodies.items()
    }
    taken = {_collision_key(body) for prompt, body in bodies.items() if as_it_is[prompt]}
    firsts = {
        prompt: body if as_it_is[prompt] else _claim(body, _digest_tails(prompt), taken)
        for prompt, body in bodies.items()
    }
    seen: Counter[str] = Counter()
    stems = []
    for prompt in prompts:
        seen[prompt] += 1
        number = seen[prompt]
        stems.append(firsts[prompt] if number == 1 else _claim(firsts[prompt], _number_tails(number), taken))
    return stems


def _digest_tails(prompt: str) -> Iterable[str]:
    """Ever longer digests: the second is needed only where a prompt spells out another's name."""
    digest = hashlib.blake2b(prompt.encode("utf-8", "surrogatepass")).hexdigest()
    return (f"-{digest[:length]}" for length in range(8, 65, 8))


def _number_tails(number: int) -> Iterable[str]:
    """-2 for the second of equal prompts, and numbers further on for where a prompt spells out that name."""
    return (f"-{higher}" for higher in itertools.count(number))


def _claim(body: str, tails: Iterable[str], taken: set[str]) -> str:
    """`body`, cut to leave room, with the first tail that gives a name not yet in `taken`; adds it there."""
    for tail in tails:
        name = _cut(body, _MAX_CHARS - len(tail), _MAX_BYTES - len(tail)) + tail
        key = _collision_key(name)
        if key not in taken:
            taken.add(key)
            return name
    raise AssertionError(f"no free name for {body!r}")


def _collision_key(name: str) -> str:
    """Equal for names that some file system takes for the same (canonical caseless matching, Unicode section 3.13)."""
    for _ in range(2):
        name = unicodedata.normalize("NFD", name).casefold()
    return unicodedata.normalize("NFD", name)


def _safe_name(prompt: str) -> str:
    """`prompt` as a legal file name of bounded length, never empty: equal to its NFC form if that is one."""
    visible = "".join(
        "_" if char in _FORBIDDEN or unicodedata.category(char) in _FORBIDDEN_CATEGORIES else char
        for char in unicodedata.normalize("NFC", prompt)
    )
    # A leading dot hides a file, a leading dash looks like an option; Windows drops dots and spaces at the end.
    name = _cut(visible.lstrip(" .-"), _MAX_CHARS, _MAX_BYTES) or "prompt"
    return _cut(f"_{name}", _MAX_CHARS, _MAX_BYTES) if _RESERVED.match(name) else name


def _cut(text: str, max_chars: int, max_bytes: int) -> str:
    """The longest beginning of `text` within both limits, whole characters, without dots and spaces at its end."""
    within = text[:max_chars].encode("utf-8")[:max_bytes].decode("utf-8", "ignore")
    return within.rstrip(" .")
