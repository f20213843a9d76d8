"""Calibration without a file: what every head keeps follows from the errors that the video itself shows early on.

Until then all heads keep all that there is, so that everything that a head could keep can be compared; the cost of that
ends with the block. It is the same measure and the same choice as with a file (dummy/calibration/), from one block of
one video instead of many blocks of other videos.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from dummy.calibration.candidates import cost
from dummy.calibration.dial import Dial
from dummy.calibration.recorder import QUERIES, HeadErrors
from dummy.observed import Outcome
from dummy.retentions import RetentionTable
from wan.attention.head_group import Observer, Retention

TIE = 1e-12  # of the heads' mean squared output, a frame: less than any error that was seen


@dataclass(frozen=True)
class OnlineCalibration:
    """Heads part by the errors in the denoising passes of block `ar_start`, which holds from the next block on.

    `dial` has the candidates and knows the model and the video, but no errors yet; `frames` is a mean over all heads.
    """

    dial: Dial
    frames: float
    ar_start: int
    in_clean_pass: ClassVar[bool] = False

    def observer(self, tokens_per_frame: int, videos: int | None, grams: Callable[[], Sequence[Tensor]]) -> HeadErrors:
        return HeadErrors(tokens_per_frame, self.dial.calibration.candidates, grams(), QUERIES, videos=videos)

    def outcome(self, seen: Observer, all_heads: Callable[[Tensor], Tensor]) -> Outcome:
        assert isinstance(seen, HeadErrors)
        parts = all_heads(seen.errors()), all_heads(seen.outputs())
        # What is no number comes of a video that is none either; it has to end all the same.
        errors, outputs = (part.cpu().nan_to_num()[None, None] for part in parts)
        errors = errors + TIE * outputs.mean() * self._shortness(seen.past)
        measured = replace(self.dial.calibration, errors=errors, outputs=outputs)
        return Outcome(replace(self.dial, calibration=measured).choose(self.frames).table.layout())

    def _shortness(self, past: int) -> Tensor:
        """[C]: 0, but for candidates that keep all `past` frames that were there. Those have lost nothing so far, as if
        the longer ones were of no use: of them the longer is the better, where the budget has room for it."""
        every, most = self.dial.calibration.candidates, self.dial.past
        return torch.tensor([float(most - cost(one, most)) if one.total >= past else 0.0 for one in every])

    def assumed(self, layers: int, heads: int) -> RetentionTable:
        """A table with as many frames as a choice may have, for plans."""
        total = round(self.frames * layers * heads)
        least, longer = divmod(total, layers * heads)
        sinks = self.sinks()
        kept = [least + (place < longer) for place in range(layers * heads)]
        rows = [Retention(min(sinks, one), max(one - sinks, 0)) for one in kept]
        return RetentionTable.of([rows[first : first + heads] for first in range(0, layers * heads, heads)])

    def beginning(self, frames: int) -> Retention:
        """All of so many frames, or of those that a window of relative positions has room for."""
        sinks, window = self.sinks(), self.dial.window
        if window is not None:
            frames = min(frames, window - self.dial.calibration.subject.frames_per_block)
        return Retention(sinks, frames - sinks)

    def sinks(self) -> int:
        """The most first frames that a head may keep."""
        return max(one.sink for one in self._retentions())

    def longest(self) -> int:
        """The most frames that a head may keep."""
        return max(one.total for one in self._retentions())

    def _retentions(self) -> list[Retention]:
        every = self.dial.calibration.candidates
        return [every[place] for place in self.dial.candidates]
