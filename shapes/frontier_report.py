"""The frontier's numbers: costs and measures of every point, what nothing beats, differences from the original, tables.

This file knows neither the model nor how a point's videos are made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shapes.report import Doubles, interval

ORIGINAL = "paper"
DENSE = "full"
# Measure -> heading, factor, decimals, whether more is better
MEASURES = {
    "quality": ("right %", 100, 1, True),
    "drift": ("drift dB", 1, 1, True),
    "seam": ("seam", 1, 3, False),
    "psnr": ("PSNR to full dB", 1, 1, True),
}
COSTS = {"context": ("frames a head", 2), "block_ms": ("ms a block", 1)}
STEADY = 3  # the first block whose time counts: the history of earlier ones is still short
JUDGED = ("drift", "seam")  # what a better policy has to be better in

Row = Mapping[str, Any]


@dataclass
class Values:
    """A point's numbers: one for every video, in the order of the captions; NaN where one does not apply."""

    videos: dict[str, list[float]] = field(default_factory=dict)
    block_ms: list[float] = field(default_factory=list)  # of steady blocks, for one video
    context: list[float] = field(default_factory=list)  # earlier frames that a head of the last block sees

    def add_batch(self, block_ms: Sequence[float], context: float) -> None:
        """Times of the blocks of videos made together, for one of them."""
        self.block_ms += block_ms[STEADY:]
        self.context.append(context)

    def add(self, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self.videos.setdefault(name, []).append(value)

    def array(self, measure: str) -> Doubles:
        return np.array(self.videos.get(measure, []), np.float64)

    def cost(self, name: str) -> float:
        """The mean, but of times the median, which other work on the machine moves less."""
        return float(np.mean(self.context)) if name == "context" else float(np.median(self.block_ms))


def pareto(cost: Mapping[str, float], value: Mapping[str, float], more_is_better: bool) -> list[str]:
    """The points that no other beats: none is at most as costly and better, or cheaper and as good."""
    sign = 1.0 if more_is_better else -1.0

    def beaten(name: str) -> bool:
        return any(
            cost[other] <= cost[name]
            and sign * value[other] >= sign * value[name]
            and (cost[other] < cost[name] or sign * value[other] > sign * value[name])
            for other in value
        )

    return sorted((name for name in value if not beaten(name)), key=lambda name: cost[name])


def best(rows: Mapping[str, Row], cost: str, measure: str) -> list[str]:
    """The names of the points that no other beats in that measure at that cost, by cost."""
    with_it = {name: row for name, row in rows.items() if measure in row}
    costs = {name: row[cost] for name, row in with_it.items()}
    return pareto(costs, {name: row[measure]["mean"] for name, row in with_it.items()}, MEASURES[measure][3])


def summary(
    found: Mapping[str, Values], chosen: Mapping[str, Sequence[str]], compared: Sequence[tuple[str, str]] = ()
) -> dict[str, Any]:
    """What frontier.json holds: costs, measures, and differences, caption by caption, from the original and between the
    points `compared`, as far as they are there."""
    rows: dict[str, dict[str, Any]] = {}
    for name, values in found.items():
        row: dict[str, Any] = {"settings": list(chosen[name]), **{cost: values.cost(cost) for cost in COSTS}}
        row |= {measure: one for measure in MEASURES if (one := interval(values.array(measure))) is not None}
        if ORIGINAL in found and name not in (ORIGINAL, DENSE):
            pairs = {m: interval(values.array(m) - found[ORIGINAL].array(m)) for m in MEASURES}
            row["against_original"] = {m: one for m, one in pairs.items() if one is not None}
        rows[name] = row
    pairs = [(one, other) for one, other in compared if one in found and other in found]
    differences = {m: [found[one].array(m) - found[other].array(m) for one, other in pairs] for m in MEASURES}
    between = [
        {"one": one, "other": other, **{m: interval(differences[m][place]) for m in MEASURES}}
        for place, (one, other) in enumerate(pairs)
    ]
    return {"points": rows, "compared": between}


def better_at_the_cost(rows: Mapping[str, Row], judge: Callable[[list[int]], bool]) -> list[str]:
    """Points that cost at most what the original does (1 % aside) and whose differences from it in JUDGED satisfy
    `judge`: 1 is better beyond the interval, -1 worse, 0 neither."""
    most = 1.01 * float(rows[ORIGINAL]["context"])
    compared = {
        name: row["against_original"]
        for name, row in rows.items()
        if row["context"] <= most and set(JUDGED) <= row.get("against_original", {}).keys()
    }
    return [name for name, against in compared.items() if judge([verdict(m, against[m]) for m in JUDGED])]


def verdict(measure: str, difference: Mapping[str, float]) -> int:
    """1 if the interval of a difference from the original lies on the better side of zero, -1 on the worse, else 0."""
    sign = 1 if MEASURES[measure][3] else -1
    return sign * (int(difference["low"] > 0) - int(difference["high"] < 0))


def better_in_both(signs: list[int]) -> bool:
    return min(signs) > 0


def better_in_one(signs: list[int]) -> bool:
    """And in the other neither better nor worse."""
    return min(signs) == 0 and max(signs) > 0


def table(content: Mapping[str, Any]) -> str:
    """Markdown: every point's costs and measures, then the differences from the original if it is among the points, and
    those of the pairs that were compared."""
    rows, pairs = content["points"], content.get("compared", [])
    return "\n".join([*_measured(rows), *(_compared(rows) if ORIGINAL in rows else []), *_between(rows, pairs)]) + "\n"


def _between(rows: Mapping[str, Row], pairs: Sequence[Row]) -> list[str]:
    """A row a pair; bold where the interval does not hold zero."""
    if not pairs:
        return []
    lines = ["", "One less the other, caption by caption; bold: beyond the interval.", ""]
    lines += _head(["frames a head", *(heading for heading, *_ in MEASURES.values())])
    for pair in pairs:
        one, other = pair["one"], pair["other"]
        cells = [f"{rows[one]['context']:.2f}, {rows[other]['context']:.2f}"]
        for measure in MEASURES:
            bold = "**" if pair[measure] is not None and verdict(measure, pair[measure]) else ""
            cells.append("-" if pair[measure] is None else f"{bold}{_difference(measure, pair[measure])}{bold}")
        lines.append(f"| {one} - {other} | " + " | ".join(cells) + " |")
    return lines


def _measured(rows: Mapping[str, Row]) -> list[str]:
    """A row a point by cost; a star where no other point beats it."""
    stars = {measure: best(rows, "context", measure) for measure in MEASURES}
    lines = _head([*(heading for heading, *_ in COSTS.values()), *(heading for heading, *_ in MEASURES.values())])
    for name in _by_cost(rows):
        cells = [f"{rows[name][cost]:.{decimals}f}" for cost, (_, decimals) in COSTS.items()]
        for measure in MEASURES:
            one = rows[name].get(measure)
            star = " \\*" if name in stars[measure] else ""
            cells.append("-" if one is None else _cell(measure, one) + star)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, "", "\\* no other point is as good at that number of frames."]


def _compared(rows: Mapping[str, Row]) -> list[str]:
    """A row a point by cost; bold where the interval does not hold zero."""
    frames = rows[ORIGINAL]["context"]
    lines = ["", f"Less `{ORIGINAL}` ({frames:.2f} frames a head), caption by caption; bold: beyond the interval.", ""]
    lines += _head(["frames a head", *(heading for heading, *_ in MEASURES.values())])
    for name in _by_cost(rows):
        if "against_original" not in rows[name]:
            continue
        cells = [f"{rows[name]['context']:.2f}"]
        for measure in MEASURES:
            one = rows[name]["against_original"].get(measure)
            bold = "**" if one is not None and verdict(measure, one) else ""
            cells.append("-" if one is None else f"{bold}{_difference(measure, one)}{bold}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    both, one_of_them = (
        ", ".join(better_at_the_cost(rows, judge)) or "none" for judge in (better_in_both, better_in_one)
    )
    lines += [
        "",
        f"At the cost of `{ORIGINAL}` or less, better in drift and seams, both beyond their intervals: {both}.",
    ]
    return [*lines, f"Better in one of the two, and in the other not worse: {one_of_them}."]


def _by_cost(rows: Mapping[str, Row]) -> list[str]:
    return sorted(rows, key=lambda name: float(rows[name]["context"]))


def _head(headings: Sequence[str]) -> list[str]:
    return ["| | " + " | ".join(headings) + " |", "|---" * (len(headings) + 1) + "|"]


def _cell(measure: str, one: Mapping[str, float]) -> str:
    _, factor, decimals, _ = MEASURES[measure]
    mean, low, high = (f"{factor * one[part]:.{decimals}f}" for part in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _difference(measure: str, one: Mapping[str, float]) -> str:
    _, factor, decimals, _ = MEASURES[measure]
    mean, low, high = (f"{factor * one[part]:+.{max(decimals, 2)}f}" for part in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
