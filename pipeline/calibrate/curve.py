"""The dial as a table and a picture: what a calibration predicts, and what a block costs, over frames a head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dummy.calibration.dial import Allocation, Dial
from dummy.calibration.measured import Calibration
from pipeline.config.config import InferenceConfig, geometry_of, load_config
from pipeline.planning.cost import block_operations
from pipeline.runtime.calibrated import load_dial
from utils.errors import InputError
from utils.figure import Figure, ticks
from wan.config import ModelConfig

FRAMES = (0, 0.5, 1, 1.33, 1.67, 2, 2.5, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 18, 24, 30, 48, 72, 96, 120, 180, 240)


@dataclass(frozen=True)
class Point:
    """At one budget what is predicted, and the operations of a block with the most history."""

    allocation: Allocation
    operations: float


def show_curve(path: Path, overrides: Sequence[str], plot: Path | None) -> str:
    """The table as text; with `plot` the picture is written into that folder. Raises InputError."""
    config, sizes = stored(path, overrides)
    points = curve(load_dial(config, sizes, path), config, sizes)
    if plot is not None:
        draw(points).save(plot, "curve")
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
    return load_config(settings, overrides) if overrides else config, model


def curve(dial: Dial, config: InferenceConfig, sizes: ModelConfig) -> list[Point]:
    """Points at FRAMES, as far as there are so many, and at the most that there is."""
    least, most = dial.limits()
    geometry, steps = geometry_of(config, sizes.in_dim), len(config.denoising_step_list)
    budgets = [frames for frames in (*FRAMES, most) if least <= frames <= most]
    found = (dial.choose(frames) for frames in dict.fromkeys(budgets))
    return [Point(one, block_operations(sizes, geometry, one.frames, steps)) for one in found]


def table(points: Sequence[Point]) -> str:
    """A row a budget; errors in per cent of the heads' mean square output, with their standard error over videos."""
    whole = points[-1].operations
    lines = [f"{'frames a head':>14}{'error %':>10}{'+-':>8}{'lengths':>9}{'TFLOP a block':>15}{'of the most %':>15}"]
    for point in points:
        one = point.allocation
        lines.append(
            f"{one.frames:14.2f}{100 * one.error:10.3f}{100 * one.spread:8.3f}{one.table.lengths():9}"
            f"{point.operations / 1e12:15.4g}{100 * point.operations / whole:15.1f}"
        )
    return "\n".join(lines) + "\n"


def draw(points: Sequence[Point]) -> Figure:
    """The predicted error (per cent of the output) and, on the same axis of frames, operations of a block."""
    figure = Figure(640, 380)
    left, top, right, bottom = 64, 40, 576, 322
    errors = [100 * point.allocation.error for point in points]
    costs = [100 * point.operations / points[-1].operations for point in points]
    frames = [point.allocation.frames for point in points]
    across, up = ticks(0, max(frames[-1], 1e-9)), ticks(0, max(*errors, 1e-9))

    def place(x: float, y: float, most: float) -> tuple[float, float]:
        return left + (right - left) * x / across[-1], bottom - (bottom - top) * y / most

    figure.text(left, 22, "Predicted error and cost over frames a head", 14)
    for x in across:
        figure.text(place(x, 0, 1)[0], bottom + 18, f"{x:g}", anchor="middle")
    for y in up:
        figure.line([place(0, y, up[-1]), place(across[-1], y, up[-1])], "#dddddd")
        figure.text(left - 8, place(0, y, up[-1])[1] + 4, f"{y:g}", anchor="end")
    for y in (0, 25, 50, 75, 100):
        figure.text(right + 8, place(0, y, 100)[1] + 4, f"{y}", fill="#b04a00")
    for values, most, colour in ((errors, up[-1], "#08519c"), (costs, 100.0, "#b04a00")):
        spots = [place(x, y, most) for x, y in zip(frames, values, strict=True)]
        figure.line(spots, colour, 2)
        for (x, y), kept, value in zip(spots, frames, values, strict=True):
            figure.circle(x, y, 3, colour, f"{kept:.2f} frames: {value:.3g} %")
    figure.text((left + right) / 2, 364, "earlier latent frames that a head keeps, mean", anchor="middle")
    figure.text(16, (top + bottom) / 2, "error, % of the output", anchor="middle", fill="#08519c", upright=True)
    figure.text(628, (top + bottom) / 2, "operations a block, %", anchor="middle", fill="#b04a00", upright=True)
    return figure
