"""Quality against cost: policies, budgets and lengths of context on the small trained model.

    python -m shapes.frontier --out FOLDER [--short] [--points NAME,NAME]

Every point gets the same captions and the same noise (shapes.evaluate). Writes frontier.json, frontier.md, and
frontier.svg with frontier.png: for each measure the points that no other beats at an equal or a smaller cost, and how
every point compares with the original's setting, caption by caption.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dummy.presets import PRESETS
from pipeline.config import load_config
from shapes import evaluate
from shapes.data import BLOCK, make_clip, pixel_frame
from shapes.measure import psnr
from shapes.report import Doubles, interval, quality, steady_ms
from shapes.score import score
from shapes.world import Floats
from utils.figure import Figure
from utils.files import write_atomic

logger = logging.getLogger(__name__)

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
SHORT = (DENSE, ORIGINAL, "traded")
FROM = pixel_frame(2 * BLOCK)  # the first block that a split after block 1 can change
SHARES = (0.25, 0.75)  # of dummy heads, beside the usual half
_WINDOWS = (5, 7, 10)  # latent frames, one sink and the block included


def points() -> dict[str, list[str]]:
    """Name -> settings of every point."""
    packed = ["dummy_forcing.enabled=true", "dummy_forcing.policy=packed", "dummy_forcing.num_dummy=0.5"]
    found = {DENSE: list(evaluate.POLICIES["full"])}
    for size in _WINDOWS:
        sizes = [f"model_kwargs.local_attn_size={size}", "model_kwargs.sink_size=1"]
        found[f"window {size}"] = ["dummy_forcing.enabled=false", *sizes]
    for preset in PRESETS:
        found[preset] = [*packed, f"dummy_forcing.preset={preset}"]
    for name in (ORIGINAL, "anchored", "traded", "static_dynamic"):
        found[f"{name} L2"] = [*found[name], "dummy_forcing.local_context_length=2"]
        for share in SHARES:
            found[f"{name} {100 * share:.0f}%"] = [*found[name], f"dummy_forcing.num_dummy={share}"]
    found[f"{ORIGINAL} by layer"] = [*found[ORIGINAL], "dummy_forcing.num_dummy_within=layer"]
    found[f"{ORIGINAL} auto"] = [*found[ORIGINAL], "dummy_forcing.num_dummy=auto"]
    equal = ["dummy_forcing.equal_cost=window", "model_kwargs.local_attn_size=7", "model_kwargs.sink_size=1"]
    found[f"{ORIGINAL} at window 7"] = [*found[ORIGINAL], *equal]
    for share in (*SHARES, 0.5):
        prune = [*evaluate.POLICIES["prune"], f"dummy_forcing.num_dummy={share}"]
        found[f"prune {100 * share:.0f}%"] = prune
    return found


@dataclass
class Values:
    """A point's numbers: one for every video, in the order of the captions; NaN where one does not apply."""

    videos: dict[str, list[float]] = field(default_factory=dict)
    block_ms: list[float] = field(default_factory=list)
    context: list[float] = field(default_factory=list)  # earlier frames that a head of the last block sees

    def add(self, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self.videos.setdefault(name, []).append(value)

    def array(self, measure: str) -> Doubles:
        return np.array(self.videos.get(measure, []), np.float64)

    def cost(self, name: str) -> float:
        return float(np.mean(self.context if name == "context" else self.block_ms))


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


def sweep(config_path: str, chosen: Mapping[str, Sequence[str]], args: argparse.Namespace) -> dict[str, Values]:
    """Generate and score every point; the first is what the others' PSNR is against."""
    configs = {name: load_config(config_path, [*settings, *args.set]) for name, settings in chosen.items()}
    parts = evaluate.Parts.load(next(iter(configs.values())))
    clips = [make_clip(evaluate.CAPTION_SEED, index, held=True) for index in range(args.captions)] * args.seeds
    reference: list[Floats] = []
    found: dict[str, Values] = {}
    for name, config in configs.items():
        began, values = time.monotonic(), Values()
        for number, (batch, group) in enumerate(evaluate.generate(parts, config, clips, args.batch)):
            if not found:
                reference.append(batch.videos)
            for video, other, clip in zip(batch.videos, reference[number], group, strict=True):
                row = evaluate.row_of(score(video, clip.scenes[0]))
                fidelity = math.nan if not found else psnr(video[FROM:], other[FROM:])
                values.add({**row, "quality": quality(row), "psnr": fidelity})
            values.block_ms.append(steady_ms(batch.block_ms))
            values.context.append(batch.context)
        found[name] = values
        logger.info("%s: %.2f frames a head, %.0f s", name, values.cost("context"), time.monotonic() - began)
    return found


def summary(found: Mapping[str, Values], chosen: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """What frontier.json holds: costs, measures, Pareto sets, and differences from the original caption by caption."""
    rows: dict[str, dict[str, Any]] = {}
    for name, values in found.items():
        row: dict[str, Any] = {"settings": list(chosen[name]), **{cost: values.cost(cost) for cost in COSTS}}
        row |= {measure: one for measure in MEASURES if (one := interval(values.array(measure))) is not None}
        if ORIGINAL in found and name not in (ORIGINAL, DENSE):
            pairs = {m: interval(values.array(m) - found[ORIGINAL].array(m)) for m in MEASURES}
            row["against_original"] = {m: one for m, one in pairs.items() if one is not None}
        rows[name] = row
    sets = {}
    for measure, (_, _, _, more) in MEASURES.items():
        with_it = {name: row[measure]["mean"] for name, row in rows.items() if measure in row}
        sets[measure] = pareto({name: rows[name]["context"] for name in rows}, with_it, more)
    return {"points": rows, "pareto": sets, "better_at_the_cost": better_at_the_cost(rows)}


def better_at_the_cost(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Points that cost at most what the original does (1 % aside) and are better in drift and in seams, both beyond
    the interval of the difference."""
    if ORIGINAL not in rows:
        return []
    most = 1.01 * float(rows[ORIGINAL]["context"])

    def better(row: Mapping[str, Any]) -> bool:
        against = row.get("against_original", {})
        return all(name in against for name in ("drift", "seam")) and (
            against["drift"]["low"] > 0 and against["seam"]["high"] < 0
        )

    return [name for name, row in rows.items() if row["context"] <= most and better(row)]


def table(content: Mapping[str, Any]) -> str:
    """Markdown: a row a point by cost; a star where it is in the Pareto set of the measure."""
    rows, sets = content["points"], content["pareto"]
    heads = [heading for heading, *_ in COSTS.values()] + [heading for heading, *_ in MEASURES.values()]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name in sorted(rows, key=lambda name: rows[name]["context"]):
        cells = [f"{rows[name][cost]:.{decimals}f}" for cost, (_, decimals) in COSTS.items()]
        for measure, (_, factor, decimals, _) in MEASURES.items():
            one = rows[name].get(measure)
            star = " \\*" if name in sets[measure] else ""
            cells.append("-" if one is None else _cell(one, factor, decimals) + star)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    better = content["better_at_the_cost"]
    lines.append(
        f"\n\\* no other point is as good at that cost. At the cost of `{ORIGINAL}`, better in drift and seams "
        f"beyond the intervals of the paired differences: {', '.join(better) if better else 'none'}."
    )
    return "\n".join(lines) + "\n"


def _cell(one: Mapping[str, float], factor: float, decimals: int) -> str:
    mean, low, high = (f"{factor * one[part]:.{decimals}f}" for part in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def draw(content: Mapping[str, Any]) -> Figure:
    """A panel for each measure: its mean and interval over the cost, the Pareto set joined and named."""
    panel, height = 420, 300
    figure = Figure(2 * panel + 20, 2 * height + 20)
    for number, measure in enumerate(MEASURES):
        _panel(figure, content, measure, 20 + number % 2 * panel, 20 + number // 2 * height, panel - 30, height - 30)
    return figure


def _panel(
    figure: Figure, content: Mapping[str, Any], measure: str, x: float, y: float, width: float, height: float
) -> None:
    heading, factor, decimals, more = MEASURES[measure]
    rows = {name: row for name, row in content["points"].items() if measure in row}
    left, top, right, bottom = x + 46, y + 24, x + width, y + height - 26
    figure.text(left, y + 10, f"{heading} ({'more' if more else 'less'} is better)", 12)
    if not rows:
        return
    most = 1.1 * max(row["context"] for row in rows.values())
    low = factor * min(row[measure]["low"] for row in rows.values())
    high = factor * max(row[measure]["high"] for row in rows.values())
    span = max(high - low, 1e-6)

    def place(cost: float, value: float) -> tuple[float, float]:
        along = math.sqrt(cost / most)  # where the cheap points would lie on top of each other otherwise
        return left + (right - left) * along, bottom - (bottom - top) * (factor * value - low) / span

    for tick in np.linspace(low, high, 5):
        _, at = place(0, float(tick) / factor)
        figure.line([(left, at), (right, at)], "#e2e2e2")
        figure.text(left - 6, at + 4, f"{tick:.{decimals}f}", 10, "end", "#666666")
    for frames in (0.0, 0.5, 1, 2, 4, 8, 16, 32):
        if frames <= most:
            figure.text(place(frames, 0)[0], bottom + 14, f"{frames:g}", 10, "middle", "#666666")
    figure.text((left + right) / 2, bottom + 26, "earlier frames a head sees", 10, "middle", "#666666")
    best = content["pareto"][measure]
    figure.line([place(rows[name]["context"], rows[name][measure]["mean"]) for name in best], "#b04a00", 1, dashed=True)
    for number, (name, row) in enumerate(rows.items()):
        colour = "#b04a00" if name in best else "#7a93ad"
        at, middle = place(row["context"], row[measure]["mean"])
        ends = [place(row["context"], row[measure][end]) for end in ("low", "high")]
        figure.line(ends, colour, 1)
        figure.circle(at, middle, 4 if name == ORIGINAL else 3, "#000000" if name == ORIGINAL else colour, name)
        if name in best or name == ORIGINAL:
            figure.text(at + 5, middle + (12 if number % 2 else -5), name, 9, fill="#222222")


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    args = _arguments(given)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    torch.set_num_threads(args.threads)
    every = points()
    names = args.points.split(",") if args.points else list(SHORT if args.short else every)
    chosen = {name: every[name] for name in dict.fromkeys([DENSE, *names])}
    content = summary(sweep(args.config, chosen, args), chosen)
    about = evaluate.about("shapes.frontier", given)
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out / "frontier.json", json.dumps({**about, **content}, indent=1) + "\n")
    write_atomic(args.out / "frontier.md", table(content))
    draw(content).save(args.out, "frontier")
    sys.stdout.write(table(content))
    return 0


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo/shapes_frontier"))
    parser.add_argument("--short", action="store_true", help=f"three points ({', '.join(SHORT)}) and 8 captions")
    parser.add_argument("--points", help=f"some of: {', '.join(points())}".replace("%", "%%"))
    parser.add_argument("--config", default=evaluate.CONFIG)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings for all points")
    parser.add_argument("--captions", type=int, help="held-out captions (default 64; 8 with --short)")
    parser.add_argument("--seeds", type=int, default=1, help="videos a caption, each with its own noise")
    parser.add_argument("--batch", type=int, default=8, help="videos made together, which share their head roles")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    args.captions = args.captions or (8 if args.short else 64)
    unknown = set(args.points.split(",") if args.points else ()) - set(points())
    if unknown:
        parser.error(f"--points: {', '.join(sorted(unknown))}: none of {', '.join(points())}")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
