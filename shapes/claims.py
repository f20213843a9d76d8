"""What the paper says of its models (arXiv 2601.20499), and what the small trained model shows: python -m shapes.claims

Prints a table in Markdown from the stored head atlas and the stored frontier; no model is needed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from dummy.atlas.report import facts
from dummy.atlas.table import Atlas
from pipeline.atlas.recording import role_settings
from pipeline.config.config import load_config
from shapes.frontier_report import DENSE, MEASURES, ORIGINAL, Row

ROOT = Path(__file__).parents[1]
CONFIG = "configs/shapes_demo.yaml"
ATLAS = ROOT / "checkpoints" / "shapes" / "atlas.safetensors"
FRONTIER = ROOT / "benchmarks" / "results" / "frontier.json"


def table(atlas: Atlas, rows: Mapping[str, Row]) -> str:
    """`rows`: the points of frontier.json."""
    found = dict(facts(atlas))
    above = next(name for name in found if name.startswith("heads above"))
    lines = [("a quarter of the heads look almost only at the block", f"{above}: {found[above]}")]
    lines += [(f"dummy sets are stable: {name}", found[name]) for name in found if "(paper: " in found[name]]
    lines += [
        ("sink heads look at the first frame", _sink_shares(atlas)),
        ("a quarter of the heads can go without their history", _prices(rows, DENSE, "prune 25%")),
        ("half of the heads dummy, packed: less than 0.5 % lost", _prices(rows, DENSE, ORIGINAL)),
        ("longer history at equal cost", _prices(rows, ORIGINAL, f"{ORIGINAL} at window 7", "window 7")),
    ]
    body = [f"| {claim} | {here} |" for claim, here in lines]
    return "\n".join(["| the paper | the small model |", "|---|---|", *body]) + "\n"


def _sink_shares(atlas: Atlas) -> str:
    """The largest share of any head by block, beside that of a head that looks everywhere alike."""
    shares, alike, more = [], [], 0
    for block in atlas.blocks:
        sink, neighbor, _ = atlas.regions(block).mean((0, 1)).unbind(-1)  # [layers, heads]
        frames = atlas.attention[block].shape[-1] - 1 + atlas.block_frames
        shares.append(f"{float(sink.max()):.3f}")
        alike.append(f"{atlas.forcing.sink_score_frames / frames:.3f}")
        more += int((sink > neighbor).sum())
    return (
        f"at most {', '.join(shares)} in blocks {', '.join(map(str, atlas.blocks))}, where looking everywhere alike is "
        f"{', '.join(alike)}; heads with more on the first frame than on the other earlier ones: {more or 'none'}"
    )


def _prices(rows: Mapping[str, Row], *names: str) -> str:
    """Cost and share of what is right for points of the frontier."""
    factor = MEASURES["quality"][1]
    return "; ".join(
        f"`{name}` {rows[name]['context']:.2f} frames a head, {factor * rows[name]['quality']['mean']:.1f} % right"
        for name in names
    )


def stored() -> str:
    """The table of what comes with the project."""
    config = load_config(ROOT / CONFIG)
    atlas = Atlas.load(ATLAS, role_settings(config), config.num_frame_per_block)
    return table(atlas, json.loads(FRONTIER.read_text(encoding="utf-8"))["points"])


if __name__ == "__main__":
    sys.stdout.write(stored())
