"""How many heads become dummy, and which: a number, a share, or as many as cost little attention.

The order in which heads are taken is that of the paper (arXiv 2601.20499): the smallest larger share of sink and
neighbour attention first. This file knows neither caches nor policies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from utils.errors import InputError

Within = Literal["model", "layer"]


@dataclass(frozen=True)
class DummyBudget:
    """`amount` heads, if it is an integer; that share of the heads, if it is a float; or, if it is "auto", as many as
    lose together at most `max_loss` of the attention of all heads.

    `max_loss` bounds the loss in the pass in which the roles are found. Later blocks lose more, since more history is
    there to be lost (docs/policies.md has figures).

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

    def possible(self, layers: int, heads: int) -> tuple[int, ...]:
        """The least and the most dummy heads that a whole model can have; one number where that is known before
        anything is observed."""
        groups, size = (1, layers * heads) if self.within == "model" else (layers, heads)
        if self.amount == "auto":
            return (0, groups * size) if self.max_loss < 1 else (groups * size,)
        return (groups * (self.amount if isinstance(self.amount, int) else round(self.amount * size)),)

    def check(self, layers: int, heads: int) -> None:
        """Raises InputError for more dummy heads than a model of this size has."""
        if not isinstance(self.amount, int):
            return
        whose, most, counted = "a layer", heads, f"{heads}"
        if self.within == "model":
            whose, most, counted = "the model", layers * heads, f"{layers} layers x {heads} heads = {layers * heads}"
        if self.amount > most:
            raise InputError(
                f"dummy_forcing.num_dummy: {self.amount} is more than {whose} has heads; use at most {counted}"
            )
