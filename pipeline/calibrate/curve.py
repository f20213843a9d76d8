"""The dial as a table and a picture: what a calibration predicts, and what a block costs, over frames a head."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dummy.atlas.plots import colour_bar, heat_map
from dummy.calibration.candidates import named
from dummy.calibration.dial import Allocation, Dial
from dummy.calibration.measured import Calibration
from pipeline.config.config import InferenceConfig, geometry_of, load_config
from pipeline.planning.cost import block_operations
from pipeline.runtime.calibrated import load_dial
from utils.errors import InputError
from utils.plots import BLUE, ORANGE, WIDTH, house_style, new_figure, save
from wan.config import ModelConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

MOST_SHOWN = 12.0  # frames; more are drawn as dark as that
MAPPED = (1.33, 2, 4)  # budgets whose choices are drawn head by head
FRAMES = (0, 0.5, 1, 1.33, 1.67, 2, 2.5, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 18, 24, 30, 48, 72, 96, 120, 180, 240)


@dataclass(frozen=True)
class Point:
    """At one budget what is predicted, and the operations of a block with the most history."""

    allocation: Allocation
    operations: float


def show_curve(path: Path, overrides: Sequence[str], plot: Path | None) -> str:
    """The table as text; with `plot` the picture is written into that folder. Raises InputError."""
    config, sizes = stored(path, overrides)
    dial = load_dial(config, sizes, path)
    points, videos = curve(dial, config, sizes), len(dial.calibration.videos)
    if plot is not None:
        save(draw(points), plot, "curve")
        save(draw_kept(points), plot, "kept")
    logger.info("%s: measured in %d video%s", path, videos, "s" if videos > 1 else "")
    return table(points)


def stored(path: Path, overrides: Sequence[str]) -> tuple[InferenceConfig, ModelConfig]:
    """The settings that a calibration was made with, changed by `overrides`, and the model's sizes. Raises
    InputError."""
    about = Calibration.load(path, "--curve").about
    settings, sizes = about.get("config"), about.get("sizes")
    if not isinstance(settings, dict) or not isinstance(sizes, dict):
        raise InputError(f"--curve: {path} does not say what it was made with; make it again")
    try:
        config, model = load_config(settings), ModelConfig.from_mapping(sizes)
    except InputError as error:
        raise InputError(f"--curve: {path}: its settings cannot be used ({error}); make it again") from error
    if overrides:
        config = load_config(settings, overrides)
        # Checks what is given, which nothing has looked at while the policy is off.
        replace(config.dummy_forcing, enabled=True, policy="calibrated", calibration=str(path), frames_per_head="full")
    return config, model


def curve(dial: Dial, config: InferenceConfig, sizes: ModelConfig) -> list[Point]:
    """Points at FRAMES, as far as there are so many, and at the most that there is."""
    least, most = dial.limits()
    geometry, steps = geometry_of(config, sizes.in_dim), len(config.denoising_step_list)
    budgets = [frames for frames in (*FRAMES, most) if least <= frames <= most]
    found = (dial.choose(frames) for frames in dict.fromkeys(budgets))
    return [Point(one, block_operations(sizes, geometry, one.frames, steps)) for one in found]


def table(points: Sequence[Point]) -> str:
    """A row a budget; errors (root mean squares) in per cent of the heads' outputs, with their standard error over
    videos, which one video does not have."""
    whole = points[-1].operations
    lines = [f"{'frames a head':>14}{'error %':>10}{'+-':>8}{'lengths':>9}{'TFLOP a block':>15}{'of the most %':>15}"]
    for point in points:
        one = point.allocation
        spread = "-" if math.isnan(one.spread) else f"{100 * one.spread:.3f}"
        lines.append(
            f"{one.frames:14.2f}{100 * one.error:10.3f}{spread:>8}{one.table.lengths():9}"
            f"{point.operations / 1e12:15.4g}{100 * point.operations / whole:15.1f}"
        )
    return "\n".join(lines) + "\n"


@house_style()
def draw(points: Sequence[Point]) -> Figure:
    """The predicted error with its standard error over videos, and below it the operations of a block, over frames."""
    figure = new_figure(0.8 * WIDTH, 4.6, "Predicted error and cost over frames a head")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    frames = [point.allocation.frames for point in points]
    errors, spreads = ([100 * getattr(point.allocation, name) for point in points] for name in ("error", "spread"))
    above.errorbar(frames, errors, spreads, fmt="o-", color=BLUE, markersize=3, linewidth=1.2, elinewidth=1)
    above.set_ylabel("error, % of the heads' output")
    above.set_ylim(bottom=0)
    costs = [100 * point.operations / points[-1].operations for point in points]
    below.plot(frames, costs, "o-", color=ORANGE, markersize=3, linewidth=1.2)
    below.set_ylabel("operations a block, %")
    below.set_ylim(0, 105)
    below.set_xlabel("earlier latent frames that a head keeps, mean over heads")
    return figure


@house_style()
def draw_kept(points: Sequence[Point]) -> Figure:
    """Layers x heads, a map for each of a few budgets: the first and the last frames that every head keeps."""
    chosen = [min(points, key=lambda point: abs(point.allocation.frames - frames)) for frames in MAPPED]
    tables = list({point.allocation.frames: point.allocation.table for point in chosen}.items())
    layers, heads = tables[0][1].shape
    title = "First + last frames that a head keeps"
    figure = new_figure(WIDTH, 1.0 + min(max(0.3 * layers, 1.0), 6.0), title)
    for axes, (frames, kept) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables, strict=True):
        totals = torch.tensor([[float(min(one.total, MOST_SHOWN)) for one in row] for row in kept.rows])
        words = [[named(one) for one in row] for row in kept.rows]
        colour_bar(heat_map(axes, totals, range(layers), range(heads), "Blues", MOST_SHOWN, words), axes)
        axes.set(title=f"{frames:.2f} frames a head", xlabel="head", ylabel="layer")
    return figure
