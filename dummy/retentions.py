"""What every head of a model keeps, head by head, and how a layer's heads are put in order for it.

Whatever decides it (head roles, a calibration, a table that is given) ends in such a table; this file knows none of
them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from wan.attention.head_group import HeadLayout, Retention


@dataclass(frozen=True)
class RetentionTable:
    """`rows[layer][head]`."""

    rows: tuple[tuple[Retention, ...], ...]

    @classmethod
    def of(cls, rows: Sequence[Sequence[Retention]]) -> RetentionTable:
        return cls(tuple(map(tuple, rows)))

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and heads."""
        return len(self.rows), len(self.rows[0])

    def layout(self) -> HeadLayout:
        """Heads that keep equally many frames stand together, since they share a buffer and an attention call; of
        those the ones with more first frames come before the others."""
        orders = [sorted(range(len(row)), key=lambda head: _place(row[head])) for row in self.rows]
        rows = [[row[head] for head in order] for row, order in zip(self.rows, orders, strict=True)]
        return HeadLayout(orders, [[(count, kept) for kept, count in Counter(row).items()] for row in rows])

    def counts(self) -> dict[Retention, int]:
        """How many heads keep what, the shortest first."""
        found = Counter(kept for row in self.rows for kept in row)
        return {kept: found[kept] for kept in sorted(found, key=_place)}

    def largest(self) -> Retention:
        """Enough for every head."""
        kept = self.counts()
        return Retention(max(one.sink for one in kept), max(one.recent for one in kept))

    def mean_frames(self, past: int) -> float:
        """Of `past` earlier frames those that a head keeps, as a mean over all heads."""
        counts = self.counts()
        return sum(count * min(kept.total, past) for kept, count in counts.items()) / sum(counts.values())

    def lengths(self) -> int:
        """The most attention calls that a layer's heads take when each has all that it keeps."""
        return max(len({kept.total for kept in row}) for row in self.rows)


def _place(kept: Retention) -> tuple[int, int]:
    return kept.total, -kept.sink
