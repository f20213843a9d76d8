"""The atlas as pictures: shares of attention over the model, the sorted curve, example heads, stability."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dummy.atlas.stability import PAPER, Overlap, stability
from dummy.atlas.table import Atlas
from dummy.roles import Role, normalised
from utils.figure import Figure, shade

HIGH = 0.8  # of a head's attention on the block at work: what the paper counts heads above
REGIONS = ("sink", "neighbor", "current")
COLOURS = ("#b04a00", "#00694a", "#08519c")  # of the three, and of the roles sink, neighbour and dummy
EXAMPLES = 2  # heads a role
_ABSENT = "#eeeeee"


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
    return [path for name, figure in draw_all(atlas).items() for path in figure.save(folder, name)]


def grid(
    figure: Figure, left: float, top: float, cell: tuple[float, float], values: Tensor, colour: str, most: float
) -> None:
    """Cells for values [rows, columns], white at 0 and `colour` at `most`; NaN is what is not there."""
    width, height = cell
    for row, line in enumerate(values.tolist()):
        for column, value in enumerate(line):
            there = value == value
            fill = shade(value / most if most > 0 else 0.0, colour) if there else _ABSENT
            tip = f"{row}, {column}: {value:.3f}" if there else ""
            gap = 0.5 if min(cell) > 4 else 0.0
            place = left + column * width, top + row * height, width - gap, height - gap
            figure.rectangle(*place, fill, tip)


def ticks(
    figure: Figure, left: float, top: float, cell: tuple[float, float], rows: Sequence[str], columns: Sequence[str]
) -> None:
    """Names of rows and columns, as many as there is room for."""
    every = max(1, round(26 / cell[0]))
    for column in range(0, len(columns), every):
        figure.text(left + (column + 0.5) * cell[0], top - 5, columns[column], 10, "middle", "#666666")
    every = max(1, round(16 / cell[1]))
    for row in range(0, len(rows), every):
        figure.text(left - 5, top + (row + 0.5) * cell[1] + 3.5, rows[row], 10, "end", "#666666")


def shares(atlas: Atlas) -> Figure:
    """Layers x heads, a map for each share, the mean over all that was recorded."""
    means = atlas.mean_regions()
    layers, heads = atlas.shape
    cell = min(max(280 / heads, 6), 34), min(max(360 / layers, 6), 24)
    panel, left, top = max(cell[0] * heads, 190) + 56, 46, 62
    figure = Figure(round(left + 3 * panel), round(top + layers * cell[1] + 16))
    figure.text(left, 20, "Share of attention, by layer (down) and head (across)", 14)
    for number, (name, colour) in enumerate(zip(REGIONS, COLOURS, strict=True)):
        x, values = left + number * panel, means[..., number]
        most = float(values.max())
        figure.text(x, 40, f"{name}: 0 (white) to {most:.2f}", 12, fill=colour)
        grid(figure, x, top, cell, values, colour, most)
        ticks(figure, x, top, cell, list(map(str, range(layers))), list(map(str, range(heads))))
    return figure


def current(atlas: Atlas) -> Figure:
    """Heads sorted by the share of their attention that stays in the block."""
    values = sorted(atlas.mean_regions()[..., 2].flatten().tolist(), reverse=True)
    above = sum(value > HIGH for value in values)
    figure = Figure(560, 340)
    left, top, width, height = 62, 48, 470, 240
    title = f"{above} of {len(values)} heads ({100 * above / len(values):.0f} %) keep more than 80 % in the block"
    figure.text(left, 24, title, 14)
    for step in range(6):
        y = top + height * (1 - step / 5)
        figure.line([(left, y), (left + width, y)], "#dddddd")
        figure.text(left - 8, y + 4, f"{20 * step} %", 11, "end", "#666666")
    y = top + height * (1 - HIGH)
    figure.line([(left, y), (left + width, y)], COLOURS[0], 1.5, dashed=True)
    step_width = width / len(values)
    points = [(left + (i + 0.5) * step_width, top + height * (1 - value)) for i, value in enumerate(values)]
    if above:
        x = left + above * step_width
        figure.line([(x, top), (x, top + height)], COLOURS[0], 1, dashed=True)
    figure.line(points, COLOURS[2], 2)
    if len(values) <= 60:
        for x, y in points:
            figure.circle(x, y, 3, COLOURS[2])
    figure.text(left + width / 2, top + height + 34, f"heads, sorted (1 to {len(values)})", 12, "middle")
    figure.text(16, top + height / 2, "attention on the own block", 12, "middle", upright=True)
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


def examples(atlas: Atlas) -> Figure:
    """For each role the most typical heads: blocks (down) by latent frames (across)."""
    blocks, frames = len(atlas.blocks), (atlas.blocks[-1] + 1) * atlas.block_frames
    cell = min(max(300 / frames, 3), 22), min(max(120 / blocks, 4), 20)
    panel, height, left, top = frames * cell[0] + 60, blocks * cell[1] + 56, 46, 44
    figure = Figure(round(left + EXAMPLES * panel), round(top + 3 * height))
    figure.text(left, 20, "Typical heads: attention from a block (down) to each latent frame (across)", 14)
    for row, (role, places) in enumerate(typical_heads(atlas).items()):
        for column, (layer, head) in enumerate(places):
            x, y = left + column * panel, top + row * height + 30
            values = frame_map(atlas, layer, head)
            most = float(values.nan_to_num().max())
            name = f"{role.name.lower()}: layer {layer}, head {head}, up to {most:.2f}"
            figure.text(x, y - 20, name, 12, fill=COLOURS[int(role)])
            grid(figure, x, y, cell, values, COLOURS[int(role)], most)
            ticks(figure, x, y, cell, list(map(str, atlas.blocks)), list(map(str, range(frames))))
    return figure


def overlaps(atlas: Atlas) -> Figure:
    """Overlap of the dummy set between blocks, steps, prompts and seeds, two by two."""
    found = stability(atlas)
    side, left, top = 200, 46, 84
    panel = side + 66
    figure = Figure(left + len(found) * panel, top + side + 20)
    figure.text(left, 20, "Overlap of the dummy set, two by two (white 0, dark 1)", 14)
    for number, (name, result) in enumerate(found.items()):
        x = left + number * panel
        figure.text(x, 44, f"between {name}: {_mean(result)}", 12, fill=COLOURS[2])
        paper = f"(paper: {PAPER[name]})" if name in PAPER else "(of one prompt)"
        figure.text(x, 60, paper, 11, fill="#666666")
        count = len(result.names)
        cell = side / count, side / count
        grid(figure, x, top, cell, result.matrix, COLOURS[2], 1.0)
        ticks(figure, x, top, cell, result.names, result.names)
    return figure


def _mean(result: Overlap) -> str:
    return "one alone" if result.mean is None else f"{result.mean:.2f}"
