"""Figures drawn by matplotlib's objects: the house style, files that are whole or absent, names beside points.

pyplot is not used, so there is no window, no global list of figures and nothing to close; matplotlib is imported when
something is drawn. Lengths of figures are inches; a page is WIDTH wide.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from utils.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.path import Path as Line
    from matplotlib.transforms import Bbox

Doubles = npt.NDArray[np.float64]
Point = tuple[float, float]

WIDTH = 8.0
ORANGE, BLUE, GREY, BLACK = (
    "#d55e00",
    "#0072b2",
    "#8a97a3",
    "#000000",
)  # the colour-blind tell them apart
ABSENT = "#eeeeee"  # what there is no value for
_STYLE = {
    "font.size": 9,
    "figure.titlesize": 10,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelcolor": "#444444",
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e2e2e2",
    "xtick.color": "#666666",
    "ytick.color": "#666666",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "text.parse_math": False,  # names may have a $ in them
    "svg.fonttype": "none",  # letters stay letters, to be read, searched and copied
}
_PNG_DPI = 200
# Names beside points, in points (1/72 inch)
_NAME_SIZE, _GAP = 8, 3.5  # of letters, and left free around them
_STEP, _REACH = 4.0, (110.0, 70.0)  # between places that are tried, and how far they go
_LEADER = 10.0  # from there on a name is joined to its point
_COVER = 12.0  # of distance are gone not to cover a place, or to pass by a point
_OVERLAP = 1e4  # and not to cover a name
_TRIES = 600  # of the best places, for one to which no line crosses another
_SAMPLES = 16  # places on a straight line


@contextmanager
def house_style() -> Iterator[None]:
    """What is drawn within looks like our other figures, whatever the user's matplotlibrc says; also a decorator."""
    from matplotlib import style

    with style.context(_STYLE, after_reset=True):
        yield


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """An empty one, which makes room for its titles and labels by itself."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, x=0.01, ha="left")
    return figure


@house_style()
def svg(figure: Figure, name: str) -> str:
    """The <svg> element, the same for the same figure. `name` is part of the ids that it refers to, so that several can
    stand in one page."""
    import matplotlib

    text = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


@house_style()
def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write NAME.svg and NAME.png. Raises InputError if the folder cannot be written."""
    painted = BytesIO()
    figure.savefig(painted, format="png", dpi=_PNG_DPI, metadata={"Software": None})
    contents: dict[Path, str | bytes] = {folder / f"{name}.svg": svg(figure, name)}
    contents[folder / f"{name}.png"] = painted.getvalue()
    for path, content in contents.items():
        write_atomic(path, content)
    return list(contents)


def name_points(figure: Figure, names: Mapping[Axes, Mapping[str, Point]]) -> None:
    """Write names beside their points (name -> place in data) in axes of the figure, when all else is drawn.

    A name stands as near as it can without covering other names, lines or points, and is joined to its point by a thin
    line where that is not beside it. The layout of the figure does not change any more after this.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes, points in names.items():
        _name_points(axes, points, figure.dpi / 72)


@house_style()
def _name_points(axes: Axes, points: Mapping[str, Point], scale: float) -> None:
    """`scale`: pixels a point (1/72 inch)."""
    axes.autoscale(False)
    room, drawn = axes.get_window_extent(), _drawn(axes)
    placed: list[tuple[Bbox, Line]] = []
    for name, place in sorted(points.items(), key=lambda item: item[1]):
        if not np.isfinite(place).all():
            continue
        label = axes.text(*place, name, ha="center", va="center", fontsize=_NAME_SIZE)
        at, size = np.asarray(axes.transData.transform(place)), np.asarray(label.get_window_extent().size)
        centres = _centres(at, size, room, drawn, [box for box, _ in placed], scale)
        tried = (_placed(at, centre, size) for centre in centres[:_TRIES])
        clear = (one for one in tried if not any(_cross(one, other) for other in placed))
        box, line = next(clear, _placed(at, centres[0], size))
        placed.append((box, line))
        x, y = axes.transData.inverted().transform((np.asarray(box.min) + box.max) / 2)
        label.set_position((x, y))
        ends = np.asarray(line.vertices)
        if np.linalg.norm(ends[1] - ends[0]) > _LEADER * scale:
            axes.plot(*axes.transData.inverted().transform(ends).T, color="#555555", linewidth=0.5)


def _drawn(axes: Axes) -> tuple[Doubles, Doubles]:
    """[N, 2], [M, 2]: places in pixels, close to each other, on the lines in the axes, and those of the points."""
    lines = [line for line in axes.lines if line.get_linestyle() != "None"]
    artists: list[tuple[Artist, Iterable[Line]]] = [(line, [line.get_path()]) for line in lines]
    artists += [(lines, lines.get_paths()) for lines in axes.collections]
    paths = [path.transformed(artist.get_transform()) for artist, paths in artists for path in paths]
    points = [line.get_transform().transform(line.get_xydata()) for line in axes.lines if line not in lines]
    nothing = np.empty((0, 2))
    return (
        np.concatenate([nothing, *(np.asarray(path.interpolated(_SAMPLES).vertices) for path in paths)]),
        np.concatenate([nothing, *map(np.asarray, points)]),
    )


def _centres(
    at: Doubles, size: Doubles, room: Bbox, drawn: tuple[Doubles, Doubles], names: Sequence[Bbox], scale: float
) -> Doubles:
    """[C, 2]: where in `room` a name of that size can stand, in pixels, the best for the point `at` first: near it,
    with no other name and little of what is drawn under it, and no other point on the way; last, where there is no
    room, on the point."""
    steps = [np.arange(-most, most + _STEP, _STEP) * scale for most in _REACH]
    centres = at + np.stack(np.meshgrid(*steps), -1).reshape(-1, 2)
    centres = centres[((centres - size / 2 > room.min) & (centres + size / 2 < room.max)).all(-1)]
    way = np.clip(at, centres - size / 2, centres + size / 2) - at  # to the nearest place of the name
    cost = np.linalg.norm(way, axis=-1)
    for place in np.concatenate(drawn):
        away = np.abs(centres - place) - size / 2
        cost += _COVER * scale * ((away[:, 0] < _GAP * scale) & (away[:, 1] < _GAP * scale))
    for point in drawn[1]:
        share = np.clip(way @ (point - at) / np.maximum((way**2).sum(-1), 1e-9), 0, 1)
        missed = np.linalg.norm(share[:, None] * way - (point - at), axis=-1)
        cost += _COVER * scale * (missed < _GAP * scale)
    for other in names:
        cost += _OVERLAP * scale * (np.abs(centres - np.mean(other, 0)) < (size + other.size) / 2 + scale).all(-1)
    return np.stack([*centres[cost.argsort(kind="stable")], at])


def _placed(at: Doubles, centre: Doubles, size: Doubles) -> tuple[Bbox, Line]:
    """The box of a name and the line to it, which begins a little off the point."""
    from matplotlib.path import Path as Line
    from matplotlib.transforms import Bbox

    box = Bbox([centre - size / 2, centre + size / 2])
    end = np.clip(at, box.min, box.max)
    return box, Line([0.95 * at + 0.05 * end, end])


def _cross(one: tuple[Bbox, Line], other: tuple[Bbox, Line]) -> bool:
    """Whether the lines that join two names to their points cross each other or a name."""
    (box, line), (other_box, other_line) = one, other
    return bool(
        line.intersects_bbox(other_box)
        or other_line.intersects_bbox(box)
        or line.intersects_path(other_line, filled=False)
    )
