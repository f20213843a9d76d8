"""Head-wise policies under a name: `dummy_forcing.preset`. Each says what heads of every role keep, and nothing else.

Lengths that should follow the settings are in contexts: one context is `local_context_length` blocks of latent frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

PresetName = Literal[
    "paper", "anchor", "neighbor_sink", "anchored", "traded", "dummy_none", "dummy_two", "static_dynamic"
]


class Kept(NamedTuple):
    """The first `sink` latent frames and the last `recent`, and of these `contexts` times L blocks more."""

    sink: int
    recent: int
    contexts: int = 0

    def frames(self, context: int) -> tuple[int, int]:
        """(first frames, last frames) for contexts of that many latent frames."""
        return self.sink, self.recent + self.contexts * context


_FIRST, _RECENT, _LAST = Kept(1, 0), Kept(0, 0, contexts=1), Kept(0, 1)  # the paper's, by role


@dataclass(frozen=True)
class Preset:
    """`source` says where the policy comes from and what it is for."""

    source: str
    sink: Kept = _FIRST
    neighbor: Kept = _RECENT
    dummy: Kept = _LAST


PRESETS: dict[PresetName, Preset] = {
    "paper": Preset("Dummy Forcing, arXiv 2601.20499: the original"),
    "anchor": Preset(
        "sink heads with the previous frame, which the original leaves them without (its weakness according to "
        "Forcing-KV, arXiv 2605.09681)",
        sink=Kept(1, 1),
    ),
    "neighbor_sink": Preset(
        "neighbour heads with the first frame, as LongLive (arXiv 2509.22622) gives its window a sink",
        neighbor=Kept(1, 0, contexts=1),
    ),
    "anchored": Preset(
        "anchor and neighbor_sink together: every head but the dummy ones sees the first and the previous frame",
        sink=Kept(1, 1),
        neighbor=Kept(1, 0, contexts=1),
    ),
    "traded": Preset(
        "anchored, paid for by the dummy heads, which see the block alone: with half of the heads dummy and the others "
        "evenly sink and neighbour it costs what the original does",
        sink=Kept(1, 1),
        neighbor=Kept(1, 0, contexts=1),
        dummy=Kept(0, 0),
    ),
    "dummy_none": Preset("dummy heads see the block alone, as with policy prune (arXiv 2601.20499)", dummy=Kept(0, 0)),
    "dummy_two": Preset("dummy heads with two recent frames", dummy=Kept(0, 2)),
    "static_dynamic": Preset(
        "in the manner of Forcing-KV (arXiv 2605.09681): static heads (sink and dummy) short with the previous frame "
        "as an anchor, dynamic heads (neighbour) twice as long; without its pruning by similarity of segments",
        sink=Kept(1, 1),
        neighbor=Kept(1, 0, contexts=2),
    ),
}
