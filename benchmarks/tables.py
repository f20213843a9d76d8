"""Tables of the README from stored results: python -m benchmarks.tables [--check]

Between `<!-- NAME -->` and `<!-- /NAME -->` the README, and the card of the small trained model, hold the table of
benchmarks/results/NAME.json, with the machine and the command that made it.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "checkpoints" / "shapes" / "README.md")
RESULTS = ROOT / "benchmarks" / "results"

Content = Mapping[str, Any]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def policies(content: Content) -> str:
    header = ("policy", "frames a head sees", "s a block", "TFLOP a block", "speed-up", "predicted by operations")
    rows = [
        (
            row["policy"],
            f"{row['frames_per_head']:.1f}",
            f"{row['block_ms'] / 1000:.1f}",
            f"{row['operations'] / 1e12:.2f}",
            f"{row['speedup']:.2f}",
            f"{row['predicted']:.2f}",
        )
        for row in content["rows"]
    ]
    return markdown(header, rows)


def shapes(content: Content) -> str:
    from shapes.report import table

    return table(content["policies"]).strip()


def memory(content: Content) -> str:
    cards = sorted({row["card"] for row in content["rows"]})
    body = []
    for resolution in sorted({row["resolution"] for row in content["rows"]}):
        cells = {row["card"]: _way(row) for row in content["rows"] if row["resolution"] == resolution}
        body.append((str(resolution), *(cells[card] for card in cards)))
    return markdown(("rows of pixels", *(f"{card} GB" for card in cards)), body)


def _way(row: Content) -> str:
    """How a video is decoded on a card, and the peak that this takes."""
    if not row["fits"]:
        return f"no ({row['peak_gib']:.1f} GiB)"
    way = row["way"]
    how = "fast" if way["aside"] else "small" if way["tile"] is None else f"tiles of {way['tile']}"
    host = f" + {row['host_gib']:.1f} on the host" if way["on_host"] else ""
    return f"{row['peak_gib']:.1f} GiB{host}, {how}"


def frontier(content: Content) -> str:
    from shapes.frontier import table

    return table(content).strip()


TABLES: dict[str, Callable[[Content], str]] = {
    "policies_cpu": policies,
    "memory": memory,
    "shapes": shapes,
    "frontier": frontier,
}


def render(name: str) -> str:
    content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    where = f"{content['device']}, torch {content['torch']}; `python -m {content['command']}`"
    return f"<!-- {name} -->\n{TABLES[name](content)}\n\n{where}\n<!-- /{name} -->"


def updated(text: str) -> str:
    """A document's text with every table made anew."""
    for name in TABLES:
        text = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, name=name: render(name), text, flags=re.DOTALL)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if a document is behind the results")
    arguments = parser.parse_args(argv)
    texts = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS}
    behind = {path: new for path, text in texts.items() if (new := updated(text)) != text}
    if not arguments.check:
        for path, new in behind.items():
            path.write_text(new, encoding="utf-8")
    return int(arguments.check and bool(behind))


if __name__ == "__main__":
    raise SystemExit(main())
