"""Which pass of which block an observer sees.

Passes are told apart by counting them, since a video without prompt switches always makes the same ones: for every
block the denoising steps, then the clean pass.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class PassCount:
    """Counts one video's passes; the first layer of a pass begins it."""

    passes_per_block: int
    _number: int = -1

    def see(self, layer: int) -> None:
        self._number += layer == 0

    @property
    def key(self) -> tuple[int, int]:
        """Block, and place in the block."""
        return divmod(self._number, self.passes_per_block)
