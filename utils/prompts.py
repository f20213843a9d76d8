"""Prompt files and storyboards.

A prompt file holds one prompt a line; a storyboard file holds one JSON object a line. This file does not know how text
is encoded; `utils.file_names` makes file names of prompts.
"""

from __future__ import annotations

import difflib
import html
import json
import logging
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from utils.errors import InputError, brief, quoted
from utils.user_paths import read_text

logger = logging.getLogger(__name__)

STORYBOARD_SUFFIX = ".jsonl"
_STORYBOARD_KEYS = ("prompts", "switch_frame_indices", "scene_cuts")
_STRUCTURED = frozenset(
    {".json", ".jsonl", ".ndjson", ".json5", ".yaml", ".yml", ".toml", ".ini", ".xml", ".html", ".htm"}
    | {".csv", ".tsv", ".xls", ".xlsx", ".ods", ".parquet", ".arrow", ".db"}
)
_FRAME_DIGITS = 9
_INVISIBLE_CATEGORIES = frozenset({"Cc", "Cf", "Mn", "Me", "Zs", "Zl", "Zp"})
_LINE_ENDS = re.compile("[\n\r\v\f\x1c-\x1f\x85]+")  # control characters that part words
_FILLERS = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # letters and a Braille pattern that are blank


def clean_line(line: str) -> str:
    """The text on one line, without the white space around it and without invisible characters, which tools leave in
    files; "" if nothing is left that can be seen, also where that is written as HTML (`&nbsp;`)."""
    text = "".join(char for char in _LINE_ENDS.sub(" ", line) if not _is_dropped(char)).strip()
    return text if any(map(_is_visible, html.unescape(html.unescape(text)))) else ""


def prompt_text(prompt: object, where: str) -> str:
    """A prompt, cleaned as `clean_line` does. Raises InputError, which begins with `where`, for what is none."""
    text = clean_line(prompt) if isinstance(prompt, str) else ""
    if not text:
        raise InputError(f"{where} must be a text that is not blank, not {brief(prompt)}.")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise InputError(f"{where} holds half a character (\\ud800 to \\udfff). Remove it.")
    return text


def _is_dropped(char: str) -> bool:
    """Byte-order marks, zero-width spaces, marks of direction and the like; not what joins letters or emoji."""
    return unicodedata.category(char) in ("Cf", "Cc") and char != "\t" and not _joins(char)


def _joins(char: str) -> bool:
    return char in "\u200c\u200d" or "\U000e0020" <= char <= "\U000e007f"  # the tags spell out flags


def _is_visible(char: str) -> bool:
    return unicodedata.category(char) not in _INVISIBLE_CATEGORIES and char not in _FILLERS


def _read_lines(path: Path, setting: str, what: str) -> list[str]:
    """The lines of a UTF-8 text file, cleaned. `what` the file should hold."""
    text = read_text(path, setting, f"file of {what}")
    # Not str.splitlines, which would also cut a prompt at characters such as U+2028.
    lines = re.split(r"\r\n|\n|\r", text)
    if not lines[-1]:
        lines.pop()
    return [clean_line(line) for line in lines]


def _numbered_content(path: Path, setting: str, what: str) -> list[tuple[int, str]]:
    """The lines that hold something, with their numbers from 1; one warning counts the others."""
    lines = _read_lines(path, setting, what)
    content = [(number, line) for number, line in enumerate(lines, start=1) if line]
    if not content:
        raise InputError(f"{_named(path, setting)}: holds no {what}, the file is empty or blank. Write one a line.")
    blank = len(lines) - len(content)
    if blank:
        logger.warning("%s: skipped %d blank line%s", path, blank, "" if blank == 1 else "s")
    return content


def _named(path: Path, setting: str) -> str:
    return f"{setting}: {path}" if setting else f"{path}"


def read_prompts(path: Path, setting: str = "") -> list[str]:
    """The prompts of a UTF-8 text file, one a line, cleaned as `clean_line` does; blank lines are skipped.

    Raises InputError, which begins with `setting`, if the file is missing, no text, of another kind (JSON, YAML, a
    table), or holds no prompt.
    """
    if path.suffix.lower() in _STRUCTURED:
        raise _not_a_list(path, setting, f"a {path.suffix.lower()} file")
    prompts = [line for _, line in _numbered_content(path, setting, "prompts")]
    if _is_json(prompts[0]) or (prompts[0][0] in "[{" and _is_json("\n".join(prompts))):
        raise _not_a_list(path, setting, "JSON")
    return prompts


def _not_a_list(path: Path, setting: str, kind: str) -> InputError:
    return InputError(
        f"{_named(path, setting)}: is {kind}, whose lines are no prompts. Give a text file with "
        f'one prompt a line, or storyboards, {{"prompts": [...]}} a line, in a file that ends in {STORYBOARD_SUFFIX}.'
    )


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), (list, dict))
    except (ValueError, RecursionError):
        return False


def is_storyboard_file(path: Path) -> bool:
    """Whether its name says so."""
    return path.suffix.lower() == STORYBOARD_SUFFIX


@dataclass(frozen=True)
class Storyboard:
    """Prompts that follow one another in one video, and the latent frames at which each but the first takes over.

    `switch_frames` is None where the storyboard leaves them to the configuration; else it is one shorter than `prompts`
    and ascends from 1 or more. `cuts`, if there are any, says of every switch whether another scene begins with it.
    """

    prompts: tuple[str, ...]
    switch_frames: tuple[int, ...] | None = None
    cuts: tuple[bool, ...] = ()


def read_storyboards(path: Path, setting: str = "") -> list[Storyboard]:
    """The storyboards of a jsonl file: `{"prompts": [...], "switch_frame_indices": [...], "scene_cuts": [...]}` a line,
    all but the first optional.

    Other keys, as lines of data sets have them, are named in one warning. Raises InputError, which names the file and
    the line, for anything else.
    """
    boards, ignored = [], dict[str, None]()
    for number, line in _numbered_content(path, setting, "storyboards"):
        where = f"{_named(path, setting)}, line {number}"
        record = _record(where, line)
        ignored.update(dict.fromkeys(key for key in record if key not in _STORYBOARD_KEYS))
        prompts = _storyboard_prompts(where, record.get("prompts"))
        switches = _switch_frames(where, record.get("switch_frame_indices"), len(prompts))
        boards.append(Storyboard(prompts, switches, _cuts(where, record.get("scene_cuts"), len(prompts))))
    if ignored:
        known = ", ".join(_STORYBOARD_KEYS)
        logger.warning("%s: keys without a use here are ignored: %s. Known: %s", path, ", ".join(ignored), known)
    return boards


def _record(where: str, line: str) -> dict[str, object]:
    try:
        record: object = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: is not JSON ({error}). Write one object a line, on one line.") from error
    if not isinstance(record, dict):
        raise InputError(f'{where}: is a JSON {type(record).__name__}, not an object. Write {{"prompts": [...]}}.')
    for key in record:
        close = difflib.get_close_matches(key, _STORYBOARD_KEYS, n=1)
        if close and close[0] not in record:
            raise InputError(f"{where}: unknown key {quoted(key)}. Did you mean {close[0]}?")
    return record


def _storyboard_prompts(where: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: prompts must be a list of at least one text, not {brief(value)}.")
    return tuple(prompt_text(prompt, f"{where}: prompts[{index}]") for index, prompt in enumerate(value))


def frame_list(value: object, where: str) -> list[int]:
    """Latent frames from a list, one number, or the text `40, 80, 120` that published storyboards have; numbers may be
    texts. Raises InputError, which begins with `where`, for anything else."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    frames = []
    for part in parts:
        digits = part.strip() if isinstance(part, str) else ""
        if isinstance(part, int) and not isinstance(part, bool):
            frames.append(part)
        elif digits.isdecimal() and len(digits) <= _FRAME_DIGITS:
            frames.append(int(digits))
        else:
            raise InputError(f"{where}: expected latent frames such as 40, 80, 120, got {brief(value)}")
    return frames


def _cuts(where: str, value: object, num_prompts: int) -> tuple[bool, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(flag, bool) for flag in value):
        raise InputError(f"{where}: scene_cuts must be a list of true and false, not {brief(value)}.")
    if len(value) != num_prompts - 1:
        raise InputError(
            f"{where}: {num_prompts} prompts need {num_prompts - 1} scene_cuts, not {len(value)}: one for each prompt "
            "but the first, true where it begins another scene."
        )
    return tuple(value)


def _switch_frames(where: str, value: object, num_prompts: int) -> tuple[int, ...] | None:
    if value is None:
        return None
    frames = tuple(frame_list(value, f"{where}: switch_frame_indices"))
    if any(late <= early for early, late in zip((0, *frames), frames, strict=False)):
        raise InputError(
            f"{where}: switch_frame_indices must be a list of ascending whole numbers from 1 on, not {brief(value)}."
        )
    if len(frames) != num_prompts - 1:
        raise InputError(
            f"{where}: {num_prompts} prompts need {num_prompts - 1} switch_frame_indices, not {len(frames)}: "
            "one for each prompt but the first."
        )
    return frames
