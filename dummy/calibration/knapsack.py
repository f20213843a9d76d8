"""One candidate for every head, so that the sum of errors is least and the sum of frames at most a budget.

A multiple-choice knapsack, solved exactly by dynamic programming over the budget (Kellerer, Pferschy, Pisinger:
"Knapsack Problems", chapter 11). Before that the Lagrangian bound rules out whatever cannot be part of a better
solution than one that is at hand (Dyer, Kayal, Walker 1984), which leaves a few candidates a head and, where a layer
may use a limited number of different candidates, a few sets of candidates a layer. Everything is computed on the host
in float64 and in a fixed order, so that equal inputs give equal choices. The file knows no models: groups are layers,
rows are heads, costs are frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Masks = npt.NDArray[np.bool_]

MEETINGS = 64  # of two lines; ten are usual
ROUNDING = 1e-12  # of the sum of all errors


def allocate(errors: Floats, costs: Sequence[int], budget: int, most: int | None = None) -> Ints:
    """The choice [groups, rows], an index into `costs`, with the least sum of `errors` [groups, rows, candidates].

    Costs are whole numbers from 0 on and sum to at most `budget`; a group uses at most `most` different candidates.
    Of equally good choices the cheaper candidates are taken. There must be a choice within the budget: that of the
    cheapest candidate everywhere.
    """
    order = np.argsort(np.asarray(costs), kind="stable")
    problem = _Problem(np.ascontiguousarray(errors[..., order], np.float64), np.asarray(costs, np.int64)[order], budget)
    assert problem.costs[0] * errors.shape[0] * errors.shape[1] <= budget and (most is None or most >= 1)
    choice = problem.solve(problem.sets(None))
    if most is not None and _most_used(choice) > most:
        choice = problem.solve(problem.sets(most))
    chosen: Ints = order[choice]
    return chosen


def _most_used(choice: Ints) -> int:
    return max(len(np.unique(row)) for row in choice)


@dataclass(frozen=True)
class _Bound:
    """What Lagrange multipliers say: no choice is better than `lower`, and `choice` is feasible.

    `multiplier` gave `lower`, and `excess` [groups, sets]: how much a group's set of candidates adds to it at least.
    `best` [groups, 2]: the group's best set there and the one that `choice` goes by.
    """

    multiplier: float
    lower: float
    choice: Ints
    excess: Floats
    best: Ints


@dataclass(frozen=True)
class _Problem:
    """Candidates in the order of their costs. A set is a row of indices of candidates that a group may use."""

    errors: Floats
    costs: Ints
    budget: int

    def sets(self, most: int | None) -> Ints:
        """[sets, most]: everything, or all sets of `most` candidates."""
        every = range(len(self.costs))
        return np.array(list(combinations(every, len(every) if most is None else min(most, len(every)))))

    def solve(self, sets: Ints) -> Ints:
        bound = self._bound(sets)
        slack = ROUNDING * float(np.abs(self.errors).sum())
        choice, gap = bound.choice, self._total(bound.choice) - bound.lower
        if gap > slack and len(sets) > 1:  # a smaller gap from the best sets alone, before the others are looked at
            options = [
                [self._mask(group, sets[row]) for row in np.unique(rows)] for group, rows in enumerate(bound.best)
            ]
            choice = self._programme(options)
            gap = self._total(choice) - bound.lower
        if gap <= slack:
            return choice
        return self._programme([self._survivors(group, sets, bound, gap + slack) for group in range(len(self.errors))])

    def _total(self, choice: Ints) -> float:
        return float(np.take_along_axis(self.errors, choice[..., None], 2).sum())

    def _fits(self, choice: Ints) -> bool:
        return int(self.costs[choice].sum()) <= self.budget

    def _bound(self, sets: Ints) -> _Bound:
        """The best multiplier: where the line of a choice that spends too much meets that of one that does not, until
        no other line lies below."""
        under, excess, lower = self._relaxed(sets, 0.0)
        rows = excess.argmin(1)
        if self._fits(under):
            return _Bound(0.0, lower, under, excess, np.stack((rows, rows), 1))
        found = 0.0, lower, excess
        over, excess, _ = self._relaxed(sets, 2 * float(np.ptp(self.errors)))  # every row takes what costs least
        rows = excess.argmin(1)
        for _ in range(MEETINGS):
            spared = int(self.costs[under].sum() - self.costs[over].sum())
            multiplier = (self._total(over) - self._total(under)) / spared
            made, excess, value = self._relaxed(sets, multiplier)
            if value > found[1]:
                found = multiplier, value, excess
            met = self._total(under) + multiplier * int(self.costs[under].sum() - self.budget)
            if not self._fits(made):
                under = made
            elif self._total(made) < self._total(over):
                over, rows = made, excess.argmin(1)
            if met - value <= ROUNDING * abs(met):
                break
        return _Bound(*found[:2], over, found[2], np.stack((found[2].argmin(1), rows), 1))

    def _relaxed(self, sets: Ints, multiplier: float) -> tuple[Ints, Floats, float]:
        """The choice where a frame costs `multiplier` instead of being limited, by every group's best set; the excess
        of every set over the best; and the bound on the errors of all that follows."""
        priced = self.errors + multiplier * self.costs
        if len(sets) == 1:
            choice = priced.argmin(2)
            return choice, np.zeros((len(priced), 1)), float(priced.min(2).sum()) - multiplier * self.budget
        choices, excesses, value = [], [], -multiplier * self.budget
        for group in priced:
            sums = _least(np.ascontiguousarray(group.T), sets.shape[1]).sum(1)
            best = int(sums.argmin())
            choices.append(sets[best][group[:, sets[best]].argmin(1)])
            excesses.append(sums - sums[best])
            value += float(sums[best])
        return np.array(choices), np.array(excesses), value

    def _mask(self, group: int, candidates: Ints) -> Masks:
        """[rows, candidates] of those that are worth their cost: a dearer one must have a smaller error."""
        errors = self.errors[group][:, candidates]
        before = np.minimum.accumulate(errors, axis=1)
        mask = np.zeros(self.errors.shape[1:], bool)
        mask[:, candidates[0]] = True
        mask[:, candidates[1:]] = errors[:, 1:] < before[:, :-1]
        return mask

    def _survivors(self, group: int, sets: Ints, bound: _Bound, gap: float) -> list[Masks]:
        """For every set that may be part of a better choice the candidates that may be."""
        priced = self.errors[group] + bound.multiplier * self.costs
        found: dict[bytes, Masks] = {}
        for row in np.flatnonzero(bound.excess[group] <= gap):
            mask = self._mask(group, sets[row])
            extra = priced - priced[:, sets[row]].min(1, keepdims=True) + bound.excess[group, row]
            mask &= extra <= gap
            found.setdefault(mask.tobytes(), mask)
        return list(found.values())

    def _programme(self, options: Sequence[Sequence[Masks]]) -> Ints:
        """The best choice in which every group goes by one of its options, masks [rows, candidates]."""
        before = [np.zeros(self.budget + 1)]
        taken = []
        for group, masks in enumerate(options):
            reached = [self._rows(before[-1], group, mask)[-1] for mask in masks]
            taken.append(np.argmin(reached, axis=0) if len(reached) > 1 else np.zeros(self.budget + 1, np.int64))
            before.append(np.min(reached, axis=0))
        left, choice = self.budget, np.zeros(self.errors.shape[:2], np.int64)
        for group in reversed(range(len(options))):
            mask = options[group][taken[group][left]]
            states = self._rows(before[group][: left + 1], group, mask)
            for row in reversed(range(len(mask))):
                allowed = np.flatnonzero(mask[row] & (self.costs <= left))
                reached = states[row][left - self.costs[allowed]] + self.errors[group, row, allowed]
                choice[group, row] = allowed[reached.argmin()]
                left -= int(self.costs[choice[group, row]])
        return choice

    def _rows(self, state: Floats, group: int, mask: Masks) -> list[Floats]:
        """The least errors [budget + 1] before each row of a group and after the last."""
        states = [state]
        for row, allowed in enumerate(mask):
            after = np.full(len(state), np.inf)
            for candidate in np.flatnonzero(allowed):
                cost = int(self.costs[candidate])
                if cost < len(state):
                    reached = states[-1][: len(state) - cost] + self.errors[group, row, candidate]
                    np.minimum(after[cost:], reached, out=after[cost:])
            states.append(after)
        return states


@lru_cache(maxsize=4)
def _tree(candidates: int, most: int) -> tuple[tuple[Ints, Ints], ...]:
    """All sets of 1, 2, ... `most` candidates in lexical order: of each its place without its last, and the last."""
    levels: list[tuple[Ints, Ints]] = []
    before: dict[tuple[int, ...], int] = {(): 0}
    for size in range(1, most + 1):
        sets = list(combinations(range(candidates), size))
        levels.append((np.array([before[one[:-1]] for one in sets]), np.array([one[-1] for one in sets])))
        before = {one: place for place, one in enumerate(sets)}
    return tuple(levels)


def _least(values: Floats, most: int) -> Floats:
    """values [candidates, rows] to the least of every set of `most` candidates, [sets, rows]; sets that begin alike
    share their work."""
    (_, first), *others = _tree(len(values), most)
    least = values[first]
    for parents, added in others:
        least = np.minimum(least[parents], values[added])
    return least
