"""TeaCache (arXiv 2411.19108): which denoising steps of a block may reuse the last computed step's residual.

The estimate depends on the timestep modulation alone, never on the video, so the decision is made once, before the run,
on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

COEFFICIENTS = (2.39676752e03, -1.31110545e03, 2.01331979e02, -8.29855975e00, 1.37887774e-01)
"""Polynomial for Wan 2.1 1.3B, highest degree first: relative change of the modulation -> change of the output."""


def computed_steps(modulations: Sequence[Tensor], threshold: float | None) -> tuple[bool, ...]:
    """For each denoising step whether its layers run; all do if `threshold` is None.

    `modulations` are the time modulations of the steps in order. The first step always runs; a later one is skipped as
    long as the estimated change since the last computed step stays below the threshold.
    """
    if threshold is None:
        return (True,) * len(modulations)
    computed = [True]
    change = 0.0
    for previous, current in pairwise(modulations):
        distance = ((current - previous).abs().mean() / previous.abs().mean()).item()
        estimate = 0.0
        for coefficient in COEFFICIENTS:
            estimate = estimate * distance + coefficient
        change += estimate
        computed.append(change >= threshold)
        if computed[-1]:
            change = 0.0
    return tuple(computed)
