"""Places for the names of points in a drawing, where they cover neither each other nor what is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Point = tuple[float, float]

STEP = 3.0  # pixels between places that are tried
NEAR = 4.0  # pixels that a label keeps from its point
_LABEL, _LEADER, _CROSSING = 1e5, 1e4, 200.0  # pixels of distance that are gone to avoid it
_SAMPLES = 16  # of a leader, to see what it runs through


@dataclass(frozen=True)
class Box:
    """Pixels from the top left corner of the drawing."""

    left: float
    top: float
    right: float
    bottom: float

    def nearest(self, point: Point) -> Point:
        """The point of the box that is nearest to `point`."""
        return min(max(point[0], self.left), self.right), min(max(point[1], self.top), self.bottom)


def place_labels(
    points: Sequence[Point], sizes: Sequence[Point], room: Box, taken: Sequence[tuple[Box, float]]
) -> list[Box]:
    """A box of each size (width, height) within `room`, as near to its point as what is there allows, in this order.

    `taken`: what is drawn already, with the pixels of distance that are worth not covering it. Boxes do not cover each
    other, nor do the lines from the points to their boxes run through boxes, as long as there is room.
    """
    placed: list[Box] = []
    leaders: list[tuple[Point, Point]] = []
    for point, (width, height) in zip(points, sizes, strict=True):
        lefts = np.arange(room.left, room.right - width + 1e-6, STEP)
        tops = np.arange(room.top, room.bottom - height + 1e-6, STEP)
        corners = np.stack(np.meshgrid(lefts, tops), -1).reshape(-1, 2)  # [N, 2]
        ends = np.clip(point, corners, corners + np.array([width, height]))  # where the leader meets the box
        cost = np.hypot(*(ends - point).T)
        cost += _LEADER * (cost < NEAR)
        for box, weight in [*taken, *((box, _LABEL) for box in placed)]:
            cost += weight * _covers(corners, (width, height), box)
        for box in placed:
            cost += _LEADER * _runs_through(point, ends, box)
        for start, end in leaders:
            cost += _CROSSING * _crosses(point, ends, start, end)
        for earlier, end in leaders:
            cost += _LEADER * _boxes_hit(corners, (width, height), earlier, end)
        left, top = (float(value) for value in corners[int(cost.argmin())])
        placed.append(Box(left, top, left + width, top + height))
        leaders.append((point, placed[-1].nearest(point)))
    return placed


def _covers(corners: Doubles, size: Point, box: Box) -> Bools:
    """[N]: whether boxes of that size at these top left corners overlap `box`."""
    left, top = corners.T
    covered: Bools = (left < box.right) & (left + size[0] > box.left) & (top < box.bottom) & (top + size[1] > box.top)
    return covered


def _runs_through(point: Point, ends: Doubles, box: Box) -> Bools:
    """[N]: whether the lines from `point` to `ends` meet `box`."""
    along = np.linspace(0, 1, _SAMPLES)[:, None, None]
    x, y = np.moveaxis(np.asarray(point) + along * (ends - point), -1, 0)  # [samples, N]
    met: Bools = ((x > box.left) & (x < box.right) & (y > box.top) & (y < box.bottom)).any(0)
    return met


def _boxes_hit(corners: Doubles, size: Point, start: Point, end: Point) -> Bools:
    """[N]: whether the line from `start` to `end` meets boxes of that size at these corners."""
    along = np.linspace(0, 1, _SAMPLES)[:, None]
    x, y = (np.asarray(start) + along * np.subtract(end, start)).T[..., None]  # [samples, 1]
    left, top = corners.T
    met: Bools = ((x > left) & (x < left + size[0]) & (y > top) & (y < top + size[1])).any(0)
    return met


def _crosses(point: Point, ends: Doubles, start: Point, end: Point) -> Bools:
    """[N]: whether the lines from `point` to `ends` cross the one from `start` to `end`."""

    def side(a: Point | Doubles, b: Point | Doubles, c: Point | Doubles) -> Doubles:
        ab, ac = np.subtract(b, a), np.subtract(c, a)
        return np.asarray(ab[..., 0] * ac[..., 1] - ab[..., 1] * ac[..., 0])

    apart = side(start, end, point) * side(start, end, ends) < 0
    return np.asarray(apart & (side(point, ends, start) * side(point, ends, end) < 0))
