"""The choice of what every head keeps: exact, within the budget and the number of lengths, and quick."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from dummy.calibration.knapsack import Floats, Ints, allocate

COSTS = [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 7, 9, 10, 13, 18]


def total(errors: Floats, choice: Ints) -> float:
    return float(np.take_along_axis(errors, choice[..., None], 2).sum())


def best(errors: Floats, costs: list[int], budget: int, most: int | None) -> float:
    """By trying everything."""
    groups, rows, candidates = errors.shape
    choices = np.array(list(itertools.product(range(candidates), repeat=groups * rows))).reshape(-1, groups, rows)
    choices = choices[np.array(costs)[choices].sum((1, 2)) <= budget]
    if most is not None:
        used = (choices[..., None] == np.arange(candidates)).any(2).sum(2)
        choices = choices[(used <= most).all(1)]
    return float(np.take_along_axis(errors[None], choices[..., None], 3).sum((1, 2, 3)).min())


@pytest.mark.parametrize("most", [None, 1, 2, 3])
def test_the_choice_is_the_best_of_all(most: int | None) -> None:
    rng = np.random.default_rng(0)
    for case in range(60):
        groups, rows, candidates = rng.integers(1, 3), rng.integers(1, 4), rng.integers(1, 5)
        if candidates ** (groups * rows) > 5000:
            continue
        errors = rng.random((groups, rows, candidates)) ** 3
        if case % 3 == 0:
            errors = np.round(errors, 1)  # ties
        costs = rng.integers(0, 5, candidates).tolist()
        budget = int(min(costs) * groups * rows + rng.integers(0, 12))
        choice = allocate(errors, costs, budget, most)
        assert np.array(costs)[choice].sum() <= budget
        assert most is None or all(len(set(row)) <= most for row in choice.tolist())
        assert total(errors, choice) == pytest.approx(best(errors, costs, budget, most), abs=1e-12)


def model(layers: int, heads: int, seed: int = 0) -> Floats:
    """Errors that fall with the frames kept, each head's at its own pace, and not quite steadily."""
    rng = np.random.default_rng(seed)
    scale, pace = np.exp(rng.normal(0, 2, (layers, heads, 1))), np.exp(rng.normal(0.5, 1, (layers, heads, 1)))
    errors: Floats = scale * np.exp(-np.array(COSTS) / pace + rng.normal(0, 0.1, (layers, heads, len(COSTS))))
    errors[..., -1] = 0
    return errors


@pytest.mark.parametrize("frames", [0.5, 1.33, 4, 17.9])
@pytest.mark.parametrize("most", [None, 3])
def test_14b_takes_less_than_a_second(frames: float, most: int | None) -> None:
    errors = model(40, 40)
    begin = time.process_time()
    choice = allocate(errors, COSTS, int(frames * 1600), most)
    assert time.process_time() - begin < 1.5  # half a second on a machine with nothing else to do
    assert np.array(COSTS)[choice].sum() <= int(frames * 1600)
    assert np.array_equal(choice, allocate(errors, COSTS, int(frames * 1600), most))


def test_more_frames_and_more_lengths_never_cost_more() -> None:
    errors = model(4, 6)
    by_frames = [total(errors, allocate(errors, COSTS, budget)) for budget in range(0, 24 * 18, 7)]
    assert by_frames == sorted(by_frames, reverse=True)
    by_lengths = [total(errors, allocate(errors, COSTS, 48, most)) for most in (1, 2, 3, 4, 6, 16, None)]
    assert by_lengths == sorted(by_lengths, reverse=True) and by_lengths[-1] < by_lengths[0]


@pytest.mark.parametrize("budget", [0, 5, 24 * 18])
def test_equal_errors_cost_nothing(budget: int) -> None:
    """Where nothing is gained, nothing is spent."""
    assert not allocate(np.ones((4, 6, 16)), COSTS, budget).any()
    assert not allocate(np.zeros((4, 6, 16)), COSTS, budget, 2).any()
