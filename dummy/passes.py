"""Which pass of which block an observer sees.

Passes are told apart by counting them, since a video without prompt switches always makes the same ones: for every
block the denoising steps, then the clean pass.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class PassCount:
    """Counts one video's passes, which are `in_first` of the first block and `per_block` of every other; the first
    layer of a pass begins it."""

    per_block: int
    in_first: int
    _number: int = -1

    def see(self, layer: int) -> None:
        self._number += layer == 0

    @property
    def key(self) -> tuple[int, int]:
        """Block, and place in the block."""
        if self._number < self.in_first:
            return 0, self._number
        block, place = divmod(self._number - self.in_first, self.per_block)
        return block + 1, place
