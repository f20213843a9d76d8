"""The atlas as pictures: shares of attention over the model, the sorted curve, example heads, stability."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dummy.atlas.stability import PAPER, Overlap, stability
from dummy.atlas.table import Atlas
from dummy.roles import Role, normalised
from utils.plots import ABSENT, BLUE, ORANGE, WIDTH, house_style, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

HIGH = 0.8  # of a head's attention on the block at work: what the paper counts heads above
REGIONS = ("sink", "neighbor", "current")
SHADES = ("Oranges", "Greens", "Blues")  # of the three, and of the roles sink, neighbour and dummy
EXAMPLES = 2  # heads a role
_NUMBERED = 20, 6  # at most so many rows and columns have room for their values
_EDGED = 60  # rows or columns from which on lines between them would hide them


def draw_all(atlas: Atlas) -> dict[str, Figure]:
    """Every picture under the name of its files."""
    drawings: dict[str, Callable[[Atlas], Figure]] = {
        "shares": shares,
        "current": current,
        "examples": examples,
        "stability": overlaps,
    }
    return {name: draw(atlas) for name, draw in drawings.items()}


def save_all(atlas: Atlas, folder: Path) -> list[Path]:
    """SVG and PNG of every picture. Raises InputError if the folder cannot be written."""
    return [path for name, figure in draw_all(atlas).items() for path in save(figure, folder, name)]


def heat_map(
    axes: Axes,
    values: Tensor,
    rows: Sequence[object],
    columns: Sequence[object],
    shades: str,
    most: float = 0.0,
    words: Sequence[Sequence[str]] | None = None,
) -> QuadMesh:
    """Cells for values [rows, columns], from white at 0 to dark at `most` (else the greatest value), grey where a value
    is NaN. Few cells have their values, or `words`, written in; of many rows or columns some have names."""
    import matplotlib

    array = np.ma.masked_invalid(values.double().numpy())
    most = most or float(array.max()) or 1.0
    colours = matplotlib.colormaps[shades].with_extremes(bad=ABSENT)
    edge = 0.5 if max(array.shape) <= _EDGED else 0.0
    mesh = axes.pcolormesh(array, cmap=colours, vmin=0, vmax=most, edgecolors="white", linewidth=edge)
    for axis, names, room in ((axes.xaxis, columns, 10), (axes.yaxis, rows, 12)):
        shown = range(0, len(names), -(-len(names) // room))
        axis.set_ticks([place + 0.5 for place in shown], [str(names[place]) for place in shown])
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.grid(False)
    axes.spines[:].set_visible(False)
    if array.shape[0] <= _NUMBERED[0] and array.shape[1] <= _NUMBERED[1]:
        for (row, column), value in np.ndenumerate(array):
            ink = "white" if value > 0.6 * most else "black"
            word = f"{value:.2f}" if words is None else words[row][column]
            axes.text(column + 0.5, row + 0.5, word, color=ink, ha="center", va="center", fontsize=7)
    return mesh


def colour_bar(mesh: QuadMesh, axes: Axes) -> None:
    """What the colours of a map mean, beside it."""
    bar = axes.figure.colorbar(mesh, ax=axes, aspect=15, pad=0.03)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2)


@house_style()
def shares(atlas: Atlas) -> Figure:
    """Layers x heads, a map for each share, the mean over all that was recorded."""
    layers, heads = atlas.shape
    title = "Share of attention, mean over blocks, passes and videos"
    figure = new_figure(WIDTH, 0.9 + min(max(0.3 * layers, 1.0), 6.0), title)
    panels = zip(figure.subplots(1, len(REGIONS)), REGIONS, SHADES, atlas.mean_regions().unbind(-1), strict=True)
    for axes, name, shades, values in panels:
        colour_bar(heat_map(axes, values, range(layers), range(heads), shades), axes)
        axes.set(title=name, xlabel="head", ylabel="layer")
    return figure


@house_style()
def current(atlas: Atlas) -> Figure:
    """Heads sorted by the share of their attention that stays in the block, with the least and greatest video."""
    mean = atlas.mean_regions()[..., 2].flatten()  # [heads of all layers]
    by_video = torch.stack([atlas.regions(block)[..., 2].mean(1).flatten(1) for block in atlas.blocks]).mean(0)
    order = mean.argsort(descending=True)
    values, low, high = (100 * found[order] for found in (mean, by_video.amin(0), by_video.amax(0)))
    above = int((mean > HIGH).sum())
    figure = new_figure(0.8 * WIDTH, 3.4)
    axes = figure.subplots()
    share, bound = f"{100 * above / len(mean):.0f} %", f"{100 * HIGH:.0f} %"
    axes.set_title(f"{above} of {len(mean)} heads ({share}) keep more than {bound} in the block")
    axes.set(xlabel="head, sorted", ylabel="attention on the own block, %", ylim=(0, 102))
    axes.set_xlim(0, len(mean) + 1)
    axes.axhline(100 * HIGH, color=ORANGE, linestyle="--", linewidth=1, label=bound)
    places = range(1, len(mean) + 1)
    axes.vlines(places, low, high, color=BLUE, alpha=0.4, linewidth=1.5, label="least to greatest video")
    axes.plot(places, values, "o", color=BLUE, markersize=4 if len(mean) <= 60 else 2, label="mean of all videos")
    axes.legend(loc="best")
    return figure


def frame_map(atlas: Atlas, layer: int, head: int) -> Tensor:
    """[recorded blocks, frames]: what a head looks at from block to block, NaN where there is nothing to see.

    What goes to the block itself is spread over its frames.
    """
    own = atlas.block_frames
    rows = torch.full((len(atlas.blocks), (atlas.blocks[-1] + 1) * own), torch.nan)
    for row, block in zip(rows, atlas.blocks, strict=True):
        mass = atlas.attention[block][:, :, layer, head].flatten(0, 1).mean(0)
        row[list(atlas.frames[block])] = mass[:-1]
        row[block * own : (block + 1) * own] = mass[-1] / own
    return rows


def typical_heads(atlas: Atlas) -> dict[Role, list[tuple[int, int]]]:
    """(layer, head) of those that look most at the sink, most at neighbours, and least at either."""
    sink, neighbor = normalised(atlas.mean_regions())
    either = torch.maximum(sink, neighbor)
    by_role = {Role.SINK: sink - neighbor, Role.NEIGHBOR: neighbor - sink, Role.DUMMY: -either}
    heads = atlas.shape[1]
    return {
        role: [divmod(index, heads) for index in score.flatten().argsort(descending=True)[:EXAMPLES].tolist()]
        for role, score in by_role.items()
    }


@house_style()
def examples(atlas: Atlas) -> Figure:
    """For each role the most typical heads: blocks (down) by latent frames (across)."""
    frames = (atlas.blocks[-1] + 1) * atlas.block_frames
    heads = typical_heads(atlas)
    height = 0.5 + len(heads) * (0.7 + min(max(0.2 * len(atlas.blocks), 0.8), 2.0))
    title = "Typical heads: share of attention from a block to a latent frame (grey: not seen)"
    figure = new_figure(WIDTH, height, title)
    for panels, (role, places) in zip(figure.subplots(len(heads), EXAMPLES, squeeze=False), heads.items(), strict=True):
        for axes, (layer, head) in zip(panels, places, strict=False):
            values = frame_map(atlas, layer, head)
            colour_bar(heat_map(axes, values, atlas.blocks, range(frames), SHADES[int(role)]), axes)
            axes.set(title=f"{role.name.lower()}: layer {layer}, head {head}", xlabel="latent frame", ylabel="block")
    return figure


@house_style()
def overlaps(atlas: Atlas) -> Figure:
    """Overlap of the dummy set between blocks, steps, prompts and seeds, two by two."""
    found = stability(atlas)
    title = "Overlap of the dummy set, two by two (0: no head in common, 1: all)"
    figure = new_figure(max(WIDTH * len(found) / 4, WIDTH / 2 + 1), 2.8, title)
    for axes, (name, result) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        mesh = heat_map(axes, result.matrix, result.names, result.names, SHADES[2], 1.0)
        paper = f"paper: {PAPER[name]}" if name in PAPER else "of one prompt"
        axes.set(title=f"{name}: {_mean(result)}\n({paper})", xlabel=name.removesuffix("s"), aspect="equal")
    colour_bar(mesh, axes)
    return figure


def _mean(result: Overlap) -> str:
    return "one alone" if result.mean is None else f"mean {result.mean:.2f}"
