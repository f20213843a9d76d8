"""Tables of the README from stored results: python -m benchmarks.tables [--check]

Between `<!-- NAME -->` and `<!-- /NAME -->` the README holds the table of benchmarks/results/NAME.json, with the
machine and the command that made it.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"

Content = Mapping[str, object]


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


TABLES: dict[str, Callable[[Content], str]] = {"policies_cpu": policies}


def render(name: str) -> str:
    content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    where = f"{content['device']}, torch {content['torch']}; `python -m {content['command']}`"
    return f"<!-- {name} -->\n{TABLES[name](content)}\n\n{where}\n<!-- /{name} -->"


def updated(text: str) -> str:
    """The README's text with every table made anew."""
    for name in TABLES:
        text = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, name=name: render(name), text, flags=re.DOTALL)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if the README is behind the results")
    arguments = parser.parse_args(argv)
    text = README.read_text(encoding="utf-8")
    new = updated(text)
    if not arguments.check:
        README.write_text(new, encoding="utf-8")
    return int(arguments.check and new != text)


if __name__ == "__main__":
    raise SystemExit(main())
