"""The frontier drawn: every measure over the earlier frames that a head sees, and over the time of a block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from shapes.frontier_report import DENSE, MEASURES, ORIGINAL, Row, best
from utils.figure import Figure, ticks
from utils.labels import Box, Point, place_labels

NAMED = (ORIGINAL, DENSE, "window 7", "anchor")  # beside those that nothing beats
_FRAMES = (0, 0.5, 1, 2, 4, 8, 16, 32, 64)  # ticks
_AXES = {"context": "earlier frames a head sees", "block_ms": "ms a block, median"}
_BEST, _OTHER, _OTHER_BAR, _FIRST = "#b04a00", "#7a93ad", "#c6d2de", "#000000"
_WIDTH, _HEIGHT, _HEAD = 460, 300, 30  # of a panel, and of what stands above all
_SIZE = 10.0  # of a name's letters


@dataclass(frozen=True)
class Axes:
    """Where costs and values lie in a panel: costs from `cheap` to `dear`, values from `low` to `high`."""

    box: Box
    cost: str
    cheap: float
    dear: float
    low: float
    high: float

    def place(self, cost: float, value: float) -> Point:
        along = (self._spread(cost) - self._spread(self.cheap)) / (self._spread(self.dear) - self._spread(self.cheap))
        up = (value - self.low) / (self.high - self.low)
        box = self.box
        return box.left + along * (box.right - box.left), box.bottom - up * (box.bottom - box.top)

    def _spread(self, cost: float) -> float:
        """Frames by their logarithm, since most points have few; half a frame more, so that none has a place."""
        return math.log2(cost + 0.5) if self.cost == "context" else cost


def draw(content: Mapping[str, Any]) -> Figure:
    """A row of panels for each measure, a column for each cost: mean and interval. What nothing beats with as few
    frames is joined and named; a small model's times are too close and too uncertain for that."""
    figure = Figure(2 * _WIDTH, _HEAD + len(MEASURES) * _HEIGHT)
    words = "bars: 95 % intervals; orange: no other point is as good with as few frames; black: the original's policy"
    figure.text(46, 20, words, 11, fill="#666666")
    for row, measure in enumerate(MEASURES):
        rows = {name: one for name, one in content["points"].items() if measure in one}
        for column, cost in enumerate(_AXES):
            x, y = column * _WIDTH, _HEAD + row * _HEIGHT
            box = Box(x + 46, y + 28, x + _WIDTH - 14, y + _HEIGHT - 36)
            heading, _, _, more = MEASURES[measure]
            figure.text(box.left, y + 18, f"{heading} ({'more' if more else 'less'} is better)", 12)
            if rows:
                _panel(figure, rows, measure, cost, box)
    return figure


def _panel(figure: Figure, rows: Mapping[str, Row], measure: str, cost: str, box: Box) -> None:
    axes = _axes(figure, rows, measure, cost, box)
    factor, front = MEASURES[measure][1], best(rows, "context", measure)
    places = {name: axes.place(row[cost], factor * row[measure]["mean"]) for name, row in rows.items()}
    bars = {
        name: [axes.place(row[cost], factor * row[measure][end]) for end in ("low", "high")]
        for name, row in rows.items()
    }
    joined = [places[name] for name in front if cost == "context"]
    for name in sorted(rows, key=lambda name: name in front):  # what matters on top
        figure.line(bars[name], _BEST if name in front else _OTHER_BAR)
    if joined:
        figure.line(joined, _BEST, dashed=True)
    for name in sorted(rows, key=lambda name: (name == ORIGINAL, name in front)):
        colour = _FIRST if name == ORIGINAL else _BEST if name in front else _OTHER
        figure.circle(*places[name], 4 if name == ORIGINAL else 3, colour, name)
    taken = [(_around(point, 5), 300.0) for point in places.values()]
    taken += [(Box(x - 1, high, x + 1, low), 60.0) for (x, low), (_, high) in bars.values()]
    taken += [(_around(point, 1), 10.0) for point in _dots(joined)]
    named = [name for name in rows if name in NAMED or (name in front and cost == "context")]
    _names(figure, {name: places[name] for name in named}, box, taken)


def _names(figure: Figure, points: Mapping[str, Point], box: Box, taken: Sequence[tuple[Box, float]]) -> None:
    """Each name near its point, joined to it by a thin line where it could not stand beside it."""
    names = sorted(points, key=lambda name: points[name])
    sizes = [(0.56 * _SIZE * len(name) + 4, _SIZE + 2) for name in names]
    for name, label in zip(names, place_labels([points[name] for name in names], sizes, box, taken), strict=True):
        end = label.nearest(points[name])
        if math.dist(points[name], end) > 6.5:
            figure.line([points[name], end], "#555555", 0.5)
        figure.text((label.left + label.right) / 2, label.bottom - 3, name, _SIZE, "middle")


def _axes(figure: Figure, rows: Mapping[str, Row], measure: str, cost: str, box: Box) -> Axes:
    """Round numbers along both sides."""
    factor = MEASURES[measure][1]
    upwards = _around_all([factor * row[measure][end] for row in rows.values() for end in ("low", "high")])
    costs = [row[cost] for row in rows.values()]
    along = [float(number) for number in _FRAMES] if cost == "context" else _around_all(costs, 8)
    cheap, dear = (0.9 * min(costs), 1.1 * max(costs) + 0.1) if cost == "context" else (along[0], along[-1])
    axes = Axes(box, cost, cheap, dear, upwards[0], upwards[-1])
    for number in upwards:
        _, at = axes.place(cheap, number)
        figure.line([(box.left, at), (box.right, at)], "#e2e2e2")
        figure.text(box.left - 6, at + 4, f"{number:g}", 10, "end", "#666666")
    for number in along:
        if cheap <= number <= dear:
            figure.text(axes.place(number, 0)[0], box.bottom + 14, f"{number:g}", 10, "middle", "#666666")
    figure.text((box.left + box.right) / 2, box.bottom + 28, _AXES[cost], 10, "middle", "#666666")
    return axes


def _around_all(values: Sequence[float], most: int = 6) -> list[float]:
    """Ticks around the values, also if they are all the same."""
    low, high = min(values), max(values)
    return ticks(low, max(high, low + 1e-3 * max(1.0, abs(low))), most)


def _around(point: Point, reach: float) -> Box:
    return Box(point[0] - reach, point[1] - reach, point[0] + reach, point[1] + reach)


def _dots(line: Sequence[Point], step: float = 6) -> Iterator[Point]:
    """Points along a line, `step` pixels apart."""
    for (x0, y0), (x1, y1) in pairwise(line):
        count = max(1, round(math.dist((x0, y0), (x1, y1)) / step))
        for number in range(count):
            yield x0 + (x1 - x0) * number / count, y0 + (y1 - y0) * number / count
