"""How many heads become dummy, and which: a number, a share, or as many as cost little attention.

The order in which heads are taken is that of the paper (arXiv 2601.20499): the smallest larger share of sink and
neighbour attention first. This file knows neither caches nor policies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Within = Literal["model", "layer"]


@dataclass(frozen=True)
class DummyBudget:
    """`amount` heads, if it is an integer; that share of the heads, if it is a float; or, if it is "auto", as many as
    lose together at most `max_loss` of the attention of all heads.

    `within`: of all heads of the model, or of each layer's.
    """

    amount: int | float | Literal["auto"] = 0
    within: Within = "model"
    max_loss: float = 0.0

    def choose(self, scores: Tensor, lost: Tensor) -> Tensor:
        """Which heads are dummy, [layers, heads] of bool; ties go by layer and head.

        `scores` [layers, heads]: the smaller, the sooner a head is taken. `lost` [layers, heads]: the share of its
        attention that a head loses if it is.
        """
        groups = (scores.reshape(1, -1), lost.reshape(1, -1)) if self.within == "model" else (scores, lost)
        chosen = torch.zeros_like(groups[0], dtype=torch.bool)
        for row, (score, loss) in enumerate(zip(*groups, strict=True)):
            order = torch.argsort(score, stable=True)
            chosen[row, order[: self._count(loss[order])]] = True
        return chosen.view(scores.shape)

    def _count(self, losses: Tensor) -> int:
        """Of one group, whose heads' losses come in the order in which they would be taken."""
        heads = len(losses)
        if self.amount == "auto":
            return int((losses.double().cumsum(0) / heads <= self.max_loss).sum())
        return self.amount if isinstance(self.amount, int) else round(self.amount * heads)

    def assumed(self, layers: int, heads: int) -> int:
        """Dummy heads of a whole model before anything is observed; "auto" is taken for half of them."""
        groups, size = (1, layers * heads) if self.within == "model" else (layers, heads)
        if self.amount == "auto":
            return groups * size // 2
        return groups * (self.amount if isinstance(self.amount, int) else round(self.amount * size))
