"""File names made from prompts: legal and different on every file system.

This file does not know what is written under the names.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

_MAX_CHARS = 100
_MAX_BYTES = 180  # leaves room in the usual 255 for a sample number, suffixes and the marks of an unfinished file
_SLUG_CHARS = 40
_FORBIDDEN = frozenset('<>:"/\\|?*')  # on Windows; "/" everywhere
# Control, format, surrogate and private characters, line and paragraph separators: invisible or not storable.
_FORBIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]) *(\.|$)", re.IGNORECASE)


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
