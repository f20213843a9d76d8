"""Candidates: what a head may be given to keep. As text `1+3` is the first frame and the last three, `0+all` all."""

from __future__ import annotations

import re
from collections.abc import Sequence

from utils.errors import InputError
from wan.attention.head_group import FULL_HISTORY, UNBOUNDED, Retention

ALL = "all"
MOST_FRAMES = 4096  # of a candidate that does not keep all; 17 minutes of video
MOST_CANDIDATES = 64
_FRAMES = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3), (0, 4), (1, 4), (0, 6), (1, 6), (0, 9))
CANDIDATES = (*(Retention(*one) for one in (*_FRAMES, (1, 9), (1, 12))), FULL_HISTORY)


def named(candidate: Retention) -> str:
    recent = ALL if candidate.recent >= UNBOUNDED else f"{candidate.recent}"
    return f"{candidate.sink}+{recent}"


def parse_candidates(names: Sequence[str], where: str) -> tuple[Retention, ...]:
    """Raises InputError, which begins with `where`, for what is no candidate, for one that is there twice, and if there
    are none or too many."""
    found: list[Retention] = []
    for name in names:
        match = re.fullmatch(r"([0-9]{1,4})\+([0-9]{1,4}|all)", name)
        one = match and Retention(int(match[1]), UNBOUNDED if match[2] == ALL else int(match[2]))
        if not one or (one.total > MOST_FRAMES and one != FULL_HISTORY):
            raise InputError(
                f"{where}: {name[:40]!r} is no candidate; write the first and the last frames that a head keeps, at "
                f"most {MOST_FRAMES} of them, such as 1+3, or 0+all"
            )
        if one in found:
            raise InputError(f"{where}: {name} is there twice; name each candidate once")
        found.append(one)
    if not 1 <= len(found) <= MOST_CANDIDATES:
        raise InputError(f"{where}: {len(found)} candidates; name 1 to {MOST_CANDIDATES}, such as 0+0,0+1,1+3,0+all")
    return tuple(found)


def cost(candidate: Retention, past: int) -> int:
    """Of `past` earlier frames those that the candidate keeps."""
    return min(candidate.total, past)
