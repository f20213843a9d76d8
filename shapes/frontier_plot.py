"""The frontier drawn: every measure over the earlier frames that a head sees, and over the time of a block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shapes.frontier_report import DENSE, MEASURES, ORIGINAL, Row, best
from utils.plots import BLACK, GREY, ORANGE, WIDTH, house_style, name_points, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMED = (ORIGINAL, DENSE, "window 7", "anchor")  # beside those that nothing beats
_FRAMES = (0, 0.5, 1, 2, 4, 8, 16, 32, 64)  # ticks
_AXES = {"context": "earlier latent frames a head sees", "block_ms": "time of a block, median, ms"}
_PANEL = 2.8  # inches


@house_style()
def draw(content: Mapping[str, Any]) -> Figure:
    """A row of panels for each measure, a column for each cost: mean and interval. What nothing beats with as few
    frames is joined and named; a small model's times are too close and too uncertain for that."""
    figure = new_figure(WIDTH, _PANEL * len(MEASURES) + 0.4)
    panels = figure.subplots(len(MEASURES), len(_AXES), sharex="col", sharey="row", width_ratios=(3, 2))
    names = {}
    for line, (measure, (heading, _, _, more)) in zip(panels, MEASURES.items(), strict=True):
        rows = {name: row for name, row in content["points"].items() if measure in row}
        line[0].set_ylabel(f"{heading} ({'more' if more else 'less'} is better)")
        for axes, cost in zip(line, _AXES, strict=True):
            axes.set_xlabel(_AXES[cost])
            axes.tick_params(labelbottom=True, labelleft=True)
            names[axes] = _panel(axes, rows, measure, cost)
    _spread_small_numbers(panels[0, 0])
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=4)
    name_points(figure, names)
    return figure


def _panel(axes: Axes, rows: Mapping[str, Row], measure: str, cost: str) -> dict[str, tuple[float, float]]:
    """Draws the points and returns the places of those that are to be named."""
    factor, front = MEASURES[measure][1], best(rows, "context", measure)
    places = {name: (row[cost], factor * row[measure]["mean"]) for name, row in rows.items()}

    def group(members: Sequence[str], colour: str, mark: str, size: float, meaning: str) -> None:
        x, ends = [rows[name][cost] for name in members], [rows[name][measure] for name in members]
        low, high = ([factor * one[end] for one in ends] for end in ("low", "high"))
        bars = "95 % interval" if colour == GREY else None
        axes.vlines(x, low, high, color=colour, alpha=0.5, linewidth=1.2, label=bars)
        y = [places[name][1] for name in members]
        axes.plot(x, y, mark, color=colour, markersize=size, label=meaning)

    if cost == "context":
        x, y = ([places[name][axis] for name in front] for axis in (0, 1))
        axes.plot(x, y, "--", color=ORANGE, linewidth=1)
    rest = [name for name in rows if name != ORIGINAL]
    group([name for name in rest if name not in front], GREY, "o", 3, "others")
    group([name for name in rest if name in front], ORANGE, "o", 4.5, "no other is as good with as few frames")
    group([name for name in rows if name == ORIGINAL], BLACK, "s", 5, f"the original's policy ({ORIGINAL})")
    named = {name: places[name] for name in rows if name in NAMED}
    taken = {_about(place) for place in named.values()}
    for name in front if cost == "context" else ():
        if _about(places[name]) not in taken:  # of points that lie on each other one is named
            named[name] = places[name]
            taken.add(_about(places[name]))
    return named


def _about(place: tuple[float, float]) -> tuple[float, float]:
    return float(f"{place[0]:.3g}"), float(f"{place[1]:.3g}")


def _spread_small_numbers(axes: Axes) -> None:
    """Frames by their logarithm, since most points have few; none has a place too."""
    axes.set_xscale("symlog", base=2, linthresh=1)
    low, high = axes.get_xlim()
    axes.set_xticks([frames for frames in _FRAMES if low <= frames <= high], minor=False)
    axes.xaxis.set_major_formatter("{x:g}")
