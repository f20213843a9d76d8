"""Frames per head as a dial: from a calibration and a budget to what every head keeps.

One file serves every budget; each turn of the dial solves the knapsack anew (dummy/calibration/knapsack.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dummy.calibration.candidates import cost
from dummy.calibration.knapsack import allocate
from dummy.calibration.measured import Calibration
from dummy.retentions import RetentionTable
from utils.errors import InputError
from wan.attention.head_group import Retention


@dataclass(frozen=True)
class Allocation:
    """What every head keeps; `error` is the sum over heads of the predicted errors (root mean squares), as a share of
    that of the heads' outputs, `spread` the standard error of it over the calibration's videos; `frames` the mean over
    heads of what they keep."""

    table: RetentionTable
    error: float
    spread: float
    frames: float


@dataclass(frozen=True)
class Dial:
    """A calibration made ready for a video in which a block has at most `past` earlier frames.

    `max_lengths`: different retentions that a layer may use. `window`: with relative positions the frames, the block's
    own included, beyond which no head may look.
    """

    calibration: Calibration
    past: int
    max_lengths: int | None = None
    window: int | None = None

    @property
    def candidates(self) -> list[int]:
        """The places of those that may be used; of several that keep all there is here, of the longest alone."""
        block = self.calibration.subject.frames_per_block
        room = self.past if self.window is None else max(self.window - block, 0)
        every = self.calibration.candidates
        fitting = [place for place, one in enumerate(every) if cost(one, self.past) <= room]
        whole = [place for place in fitting if every[place].total >= self.past]
        longest = max(whole, key=lambda place: every[place].total, default=-1)
        return [place for place in fitting if place == longest or place not in whole]

    def limits(self) -> tuple[float, float]:
        """The fewest and the most frames a head that there are. Raises InputError if no candidate may be used."""
        if not self.candidates:
            raise InputError(
                f"dummy_forcing.calibration: none of its candidates fits model_kwargs.local_attn_size {self.window} "
                "with rope=relative; use a larger window, or rope=absolute"
            )
        costs = [cost(self.calibration.candidates[place], self.past) for place in self.candidates]
        return float(min(costs)), float(max(costs))

    def choose(self, frames: float) -> Allocation:
        """The least error with `frames` earlier frames a head, as a mean over all heads of all layers; their sum is
        rounded, so that 1.33 is a third for 24 heads and for 360. Raises InputError as `check` does."""
        self.check(frames)
        places, every = self.candidates, self.calibration.candidates
        errors = self.calibration.mean_errors()[..., places].numpy()
        layers, heads, _ = errors.shape
        costs = [cost(every[place], self.past) for place in places]
        choice = allocate(errors, costs, round(frames * layers * heads), self.max_lengths)
        return self.predict(torch.tensor(places)[torch.from_numpy(choice)])

    def check(self, frames: float) -> None:
        """Raises InputError for a budget that the candidates do not reach down or up to."""
        least, most = self.limits()
        if not least <= frames <= most:
            window = "" if self.window is None else f", in the window model_kwargs.local_attn_size {self.window}"
            raise InputError(
                f"dummy_forcing.frames_per_head: {frames:g} is {'less' if frames < least else 'more'} than there is: "
                f"with the candidates of dummy_forcing.calibration and at most {self.past} earlier frames in this "
                f"video{window} a head keeps {least:g} to {most:g} frames; use a number in that range"
            )

    def predict(self, choice: Tensor) -> Allocation:
        """What comes of a choice [layers, heads] of places of candidates."""
        every = self.calibration.candidates
        table = RetentionTable.of([[every[place] for place in row] for row in choice.tolist()])
        error = self.calibration.mean_errors().gather(2, choice[..., None]).sum()
        by_video = self.calibration.video_errors()
        sums = by_video.gather(3, choice.expand(len(by_video), -1, -1)[..., None]).sum((1, 2, 3))
        output = self.calibration.output() or math.nan  # of a layer that puts out nothing there is no share
        spread = float(sums.std()) / len(sums) ** 0.5 if len(sums) > 1 else math.nan
        return Allocation(table, float(error) / output, spread / output, table.mean_frames(self.past))


def in_words(kept: Retention, past: int) -> str:
    """What of `past` earlier frames a head keeps."""
    if kept.total >= past:
        return f"all {past} frames"
    return f"first {kept.sink} + last {kept.recent} = {kept.total} frames"
