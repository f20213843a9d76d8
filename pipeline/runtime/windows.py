"""In which order blocks are denoised: passes over windows of neighbouring blocks, each block at a step of its own.

Mostly a window is one block, which takes all its steps before the next one begins. In a rolling window (Rolling
Forcing, arXiv 2509.25161) a new block enters with every pass while all others go one step further, so that the oldest
one is finished.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """A pass over the blocks from `first` on, which are at the given steps; 0 is the noisiest."""

    first: int
    steps: tuple[int, ...]

    @property
    def entering(self) -> int | None:
        """The block that is at its first step, if there is one: the last."""
        return None if self.steps[-1] else self.first + len(self.steps) - 1


@dataclass(frozen=True)
class Round:
    """The passes after which `block` is finished."""

    block: int
    windows: tuple[Window, ...]


def one_by_one(blocks: int, given: int, first_steps: int, steps: int) -> Iterator[Round]:
    """Every block takes all its steps: the first that is made `first_steps`, others `steps`; `given` ones none."""
    for block in range(blocks):
        count = 0 if block < given else first_steps if block == given else steps
        yield Round(block, tuple(Window(block, (step,)) for step in range(count)))


def rolling(blocks: int, steps: int) -> Iterator[Round]:
    """A new block with every pass until there are no more; `blocks` is at least `steps`."""
    for block in range(blocks):
        numbers = range(steps) if block == 0 else [block + steps - 1]
        yield Round(block, tuple(_rolling_window(number, blocks, steps) for number in numbers))


def _rolling_window(number: int, blocks: int, steps: int) -> Window:
    first, last = max(0, number - steps + 1), min(blocks - 1, number)
    return Window(first, tuple(number - block for block in range(first, last + 1)))


def rolling_context(window: Window, block: int, most: int) -> tuple[list[int], int]:
    """What a rolling window sees besides itself, and where it sees the first block: the frames just before it, which
    are where they belong, and the first block's, placed before those; in all at most `most` frames of blocks of
    `block`."""
    start, frames = window.first * block, len(window.steps) * block
    if not start:
        return [], 0
    recent = min(most - frames - block, start - block)
    return [*range(block), *range(start - recent, start)], start - recent - block
