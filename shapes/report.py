"""The evaluation's numbers: means with confidence intervals, as a table, as JSON, as a plot, and held to bounds.

    python -m shapes.report REPORT.json FIGURE.svg

draws a stored report anew.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
from torch import Tensor

from utils import command
from utils.errors import InputError, brief
from utils.files import write_atomic
from utils.plots import BLUE, WIDTH, house_style, name_points, new_figure, svg
from utils.user_paths import read_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

Doubles = npt.NDArray[np.float64]

RESAMPLES = 1000  # of the bootstrap
COVERAGE = 0.95
# Metric -> heading, factor, decimals
COLUMNS = {
    "colour": ("colour %", 100, 1),
    "shape": ("shape %", 100, 1),
    "motion": ("motion %", 100, 1),
    "remembered": ("remembered %", 100, 1),
    "background": ("background %", 100, 1),
    "mark": ("mark %", 100, 1),
    "way": ("way %", 100, 1),
    "position": ("position px", 1, 2),
    "drift": ("drift dB", 1, 1),
    "seam": ("seam", 1, 2),
    "psnr": ("PSNR to full dB", 1, 1),
    "later_right": ("after switch %", 100, 1),
    "later_command_right": ("after switch: commands %", 100, 1),
    "later_scene_right": ("after switch: new scenes %", 100, 1),
    "later_colour": ("after switch: colour %", 100, 1),
    "later_shape": ("after switch: shape %", 100, 1),
    "later_motion": ("after switch: motion %", 100, 1),
    "later_background": ("after switch: background %", 100, 1),
    "later_position": ("after switch px", 1, 2),
    "ten_right": ("scenes of ten switches %", 100, 1),
    "long_right": ("after 60 s %", 100, 1),
    "long_colour": ("after 60 s: colour %", 100, 1),
    "long_shape": ("after 60 s: shape %", 100, 1),
    "long_motion": ("after 60 s: motion %", 100, 1),
    "long_background": ("after 60 s: background %", 100, 1),
    "long_still": ("after 60 s: still dB", 1, 1),
    "long_drift": ("after 60 s: drift dB", 1, 1),
    "long_brightness": ("after 60 s: brightness %", 1, 2),
    "long_hue": ("after 60 s: hue %", 1, 2),
    "block_ms": ("ms a block", 1, 1),
}
QUALITY = ("colour", "shape", "motion", "remembered")  # what the plot's vertical axis is the mean of


class Report:
    """Collects the rows of every policy."""

    def __init__(self, policies: list[str]) -> None:
        self.policies = policies
        self._values: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in policies}
        self._shares: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, policy: str, row: dict[str, float]) -> None:
        """A video's numbers; NaN where one does not apply."""
        for name, value in row.items():
            self._values[policy][name].append(value)
        if all(name in row for name in QUALITY):
            self._values[policy]["quality"].append(quality(row))

    def add_batch(self, policy: str, block_ms: list[float], current_share: Tensor | None) -> None:
        """Times after the first blocks, whose history is still short, and heads' shares of attention on the block."""
        self._values[policy]["block_ms"].append(steady_ms(block_ms))
        if current_share is not None:
            self._shares[policy].append(current_share)

    def mean(self, policy: str, metric: str) -> float | None:
        """The mean of what applies, None where nothing does."""
        found = self._interval(policy, metric)
        return None if found is None else found["mean"]

    def interval(self, policy: str, metric: str) -> tuple[float, float]:
        """A bootstrap interval of the mean; there must be values that apply."""
        found = self._interval(policy, metric)
        assert found is not None
        return found["low"], found["high"]

    def _interval(self, policy: str, metric: str) -> dict[str, float] | None:
        return interval(np.array(self._values[policy].get(metric, []), np.float64))

    def as_dict(self) -> dict[str, object]:
        result: dict[str, object] = {}
        for policy in self.policies:
            found = {metric: self._interval(policy, metric) for metric in [*COLUMNS, "quality"]}
            row: dict[str, object] = {metric: one for metric, one in found.items() if one is not None}
            if self._shares[policy]:
                shares = sum(self._shares[policy][1:], self._shares[policy][0]) / len(self._shares[policy])
                row["current_share"] = [[round(float(v), 4) for v in layer] for layer in shares]
            result[policy] = row
        return result


def interval(values: Doubles) -> dict[str, float] | None:
    """Mean, bootstrap interval and number of what applies (is not NaN); None where nothing does."""
    known = values[~np.isnan(values)]
    if not len(known):
        return None
    means = known[np.random.default_rng(0).integers(len(known), size=(RESAMPLES, len(known)))].mean(1)
    tail = (1 - COVERAGE) / 2
    low, high = (float(np.quantile(means, part)) for part in (tail, 1 - tail))
    return {"mean": float(known.mean()), "low": low, "high": high, "n": len(known)}


def steady_ms(block_ms: Sequence[float]) -> float:
    """The mean over the blocks after the first three, whose history is still short."""
    return float(np.mean(block_ms[3:]))


def quality(row: Mapping[str, float]) -> float:
    """The mean of what is right in one video."""
    return float(np.mean([row[name] for name in QUALITY]))


def table(policies: Mapping[str, Any]) -> str:
    """Markdown of `Report.as_dict`: a row a metric that was measured, a column a policy, the interval in brackets."""
    lines = ["| | " + " | ".join(policies) + " |", "|---" * (len(policies) + 1) + "|"]
    for metric, (heading, factor, decimals) in COLUMNS.items():
        if not any(metric in row for row in policies.values()):
            continue
        cells = [_cell(row.get(metric), factor, decimals) for row in policies.values()]
        lines.append(f"| {heading} | " + " | ".join(cells) + " |")
    observed = [(policy, row["current_share"]) for policy, row in policies.items() if "current_share" in row]
    for policy, rows in observed[:1]:
        shares = np.array(rows)
        above, below = int((shares > 0.8).sum()), int((shares < 0.3).sum())
        lines.append(
            f"\nAttention on the own block ({policy}): {shares.min():.2f} to {shares.max():.2f}; "
            f"{above} heads above 80 %, {below} below 30 %, of {shares.size}."
        )
    return "\n".join(lines) + "\n"


def _cell(value: Mapping[str, float] | None, factor: float, decimals: int) -> str:
    if value is None:
        return "-"
    mean, low, high = (f"{factor * value[name]:.{decimals}f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


@house_style()
def plot(policies: Mapping[str, Any]) -> Figure:
    """Of `Report.as_dict`: quality (mean of QUALITY, %) against milliseconds a block, with the intervals of both."""
    figure = new_figure(0.75 * WIDTH, 3.8)
    axes = figure.subplots()
    shown = {name: row for name, row in policies.items() if {"quality", "block_ms"} <= row.keys()}
    time, right = ([row[metric] for row in shown.values()] for metric in ("block_ms", "quality"))
    x, y = [one["mean"] for one in time], [100 * one["mean"] for one in right]
    axes.hlines(y, *([one[end] for one in time] for end in ("low", "high")), color=BLUE, alpha=0.5)
    axes.vlines(x, *([100 * one[end] for one in right] for end in ("low", "high")), color=BLUE, alpha=0.5)
    axes.plot(x, y, "o", color=BLUE, markersize=5)
    axes.margins(0.12)
    axes.set(title=f"bars: {100 * COVERAGE:.0f} % intervals", xlabel="time of a block, ms")
    axes.set_ylabel(f"right, % ({', '.join(QUALITY)})")
    axes.yaxis.set_major_formatter("{x:g}")
    name_points(figure, {axes: dict(zip(shown, zip(x, y, strict=True), strict=True))})
    return figure


def write_report(report: Report, folder: Path, about: Mapping[str, object]) -> None:
    """report.json, with `about` (command, machine) in it, and report.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    policies = report.as_dict()
    write_atomic(folder / "report.json", json.dumps({**about, "policies": policies}, indent=1) + "\n")
    write_atomic(folder / "report.svg", svg(plot(policies), "report"))


def gate_bounds(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    """What `check_gate` reads. Raises InputError for a file that is no such thing."""
    content = read_json(path, "--gate", "file of bounds")
    for policy, metrics in _entries(content, path, ""):
        for metric, bound in _entries(metrics, path, policy):
            where = f"{policy}: {metric}"
            for end, value in _entries(bound, path, where):
                if end not in ("min", "max") or isinstance(value, bool) or not isinstance(value, (int, float)):
                    raise InputError(f"--gate: {path}: {where}: expected min, max or both, got {brief(bound)}")
    return cast("dict[str, dict[str, dict[str, float]]]", content)


def _entries(section: object, path: Path, where: str) -> Iterable[tuple[str, object]]:
    if not isinstance(section, dict) or not section:
        of = f"{where}: " if where else ""
        raise InputError(f"--gate: {path}: {of}expected a section with entries, got {brief(section)}")
    return section.items()


def check_gate(report: Report, path: Path) -> int:
    """0 if the file's bounds (policy -> metric -> {"min": x} or {"max": x}) are kept, else 1; each miss is logged."""
    missed = 0
    for policy, metrics in gate_bounds(path).items():
        for metric, bound in metrics.items():
            value = report.mean(policy, metric) if policy in report.policies else None
            kept = value is not None and bound.get("min", -np.inf) <= value <= bound.get("max", np.inf)
            if not kept:
                missed += 1
                logger.error("%s: %s is %s, not within %s", policy, metric, value, bound)
    return int(missed > 0)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, metavar="REPORT.json")
    parser.add_argument("figure", type=Path, metavar="FIGURE.svg")
    args = parser.parse_args(argv)
    content = read_json(args.report, "REPORT.json", "report")
    try:
        drawn = svg(plot(cast("dict[str, Any]", content)["policies"]), args.figure.stem)
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(f"REPORT.json: {args.report} is no report of shapes.evaluate; make one") from error
    write_atomic(args.figure, drawn)
    return 0


if __name__ == "__main__":
    raise SystemExit(command.run(main, log_format=None))
