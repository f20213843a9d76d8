"""Tables of the documents from stored results: python -m benchmarks.tables [--check]

Between `<!-- NAME -->` and `<!-- /NAME -->` the documents hold the table of
benchmarks/results/NAME.json, with the machine and the command that made it. What comes before the first underscore of
NAME says what kind of table that is; where there are no results there is no table. In `claims` is what shapes.claims
prints.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils import command
from utils.memory import format_bytes

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "checkpoints" / "shapes" / "README.md")
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


def dit(content: Content) -> str:
    """Rows of benchmarks.dit; how much faster than the first engine at the same policy, and than full history."""
    rows = content["rows"]
    body = []
    for row in rows:
        engine, full = compared(rows, row)
        body.append(
            (
                row["resolution"],
                row["policy"],
                f"{row['engine']}, {row['attention']}, {row['precision']}",
                f"{row['frames_per_head']:.1f}",
                f"{row['block_ms']:.0f}",
                f"{row['fps']:.3g}",
                f"{row['tflops']:.3g} ({100 * row['share']:.0f} %)",
                "-" if engine is None else f"{engine['block_ms'] / row['block_ms']:.2f}",
                "-" if full is None else f"{full['block_ms'] / row['block_ms']:.2f} ({predicted(full, row):.2f})",
            )
        )
    header = ["rows of pixels", "policy", "engine", "frames a head sees", "ms a block", "FPS (DiT)"]
    header += ["TFLOP/s (of a large product)", f"against {rows[0]['engine']}", "against full (predicted)"]
    return markdown(header, body)


def compared(rows: Sequence[Content], row: Content) -> tuple[Content | None, Content | None]:
    """What a row of benchmarks.dit is compared with: the first engine at the same policy, and full history on the same
    engine; None where that is the row itself, or is not there."""

    def find(*same: str, **wanted: str) -> Content | None:
        names = ("resolution", "precision", "attention", *same)
        alike = (r for r in rows if all(r[name] == row[name] for name in names))
        found = next((r for r in alike if all(r[name] == value for name, value in wanted.items())), None)
        return None if found is row else found

    engine = find("policy")
    return None if engine is None or engine["engine"] == row["engine"] else engine, find("engine", policy="full")


def predicted(full: Content, row: Content) -> float:
    """How much faster than full history a row should be by its operations."""
    return float(full["operations"] / row["operations"])


def vae(content: Content) -> str:
    header = ["rows of pixels", "decoder", "engine", "type", "ms a clip", "ms a block"]
    header += ["times as fast", "peak (of the first)", "dB"]
    body = [
        (
            *(row[name] for name in ("resolution", "decoder", "engine", "dtype")),
            f"{row['clip_ms']:.0f}",
            "-" if row["block_ms"] is None else f"{row['block_ms']:.0f}",
            f"{row['ratio']:.2f}",
            f"{format_bytes(row['peak_bytes'])} ({row['peak_ratio']:.2f})",
            "-" if row["decibel"] is None else f"{row['decibel']:.0f}",
        )
        for row in content["rows"]
    ]
    return markdown(header, body)


def end_to_end(content: Content) -> str:
    header = ["rows of pixels", "policy", "engine", "overlap", "s a clip", "first frame, s"]
    header += ["block: DiT, VAE, copy, write, ms", "FPS", "steady FPS", "peak"]
    body = [
        (
            *(row[name] for name in ("resolution", "policy", "engine")),
            "yes" if row["overlap"] else "no",
            f"{row['total_ms'] / 1000:.2f}",
            f"{row['first_frame_ms'] / 1000:.2f}",
            ", ".join(f"{row[f'{part}_ms']:.0f}" for part in ("block", "decode", "copy", "write")),
            f"{row['fps']:.1f}",
            "-" if row["steady_fps"] is None else f"{row['steady_fps']:.1f}",
            "-" if row["peak_bytes"] is None else format_bytes(row["peak_bytes"]),
        )
        for row in content["rows"]
    ]
    return markdown(header, body)


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
    strategy = row["strategy"]
    how = (
        "fast"
        if strategy["on_side_stream"]
        else "small"
        if strategy["tile"] is None
        else f"tiles of {strategy['tile']}"
    )
    host = f" + {row['host_gib']:.1f} on the host" if strategy["on_host"] else ""
    return f"{row['peak_gib']:.1f} GiB{host}, {how}"


def scale(content: Content) -> str:
    from benchmarks.scale import table

    return table(content["rows"], None)


def frontier(content: Content) -> str:
    from shapes.frontier_report import table

    return table(content).strip()


def compare(content: Content) -> str:
    """Rows of benchmarks.compare: means and 95 % intervals over videos."""
    columns = {"psnr": 1, "ssim": 3, "drift": 2, "seam": 2, "motion": 2, "block_s": 3}  # decimals

    def cell(row: Content, name: str) -> str:
        if name not in row:
            return "-"
        mean, low, high = (f"{row[name][end]:.{columns[name]}f}" for end in ("mean", "low", "high"))
        return f"{mean} [{low}, {high}]"

    header = ["policy", "frames a head", "PSNR, dB", "SSIM", "drift", "seam", "motion, px", "s a block (DiT)"]
    body = [
        (
            policy,
            f"{row['context']:.2f}",
            *(cell(row, name) for name in columns),
            format_bytes(row["cache_bytes"]),
            format_bytes(row["peak_bytes"]) if row["peak_bytes"] else "-",
        )
        for policy, row in content["policies"].items()
    ]
    return markdown([*header, "cache", "GPU peak"], body)


def study(content: Content) -> str:
    from shapes.calibration_study import table

    return table(content).strip()


def claims() -> str:
    from shapes import claims

    return f"{claims.stored()}\n`python -m shapes.claims`"


KINDS: dict[str, Callable[[Content], str]] = {
    "policies": policies,
    "dit": dit,
    "vae": vae,
    "end": end_to_end,
    "memory": memory,
    "shapes": shapes,
    "frontier": frontier,
    "scale": scale,
    "compare": compare,
    "study": study,
}
GPU = (
    "dit_480",
    "dit_attention_480",
    "dit_calibrated_480",
    "dit_fp8_480",
    "dit_720",
    "dit_1080",
    "end_to_end",
    "vae",
    "vae_1080",
)
_REGION = re.compile(r"<!-- (\w+) -->.*?<!-- /\1 -->", flags=re.DOTALL)


def render(name: str) -> str:
    if name == "claims":
        return f"<!-- claims -->\n{claims()}\n<!-- /claims -->"
    if name == "gpu":
        return f"<!-- gpu -->\n{gpu()}\n<!-- /gpu -->"
    return f"<!-- {name} -->\n{stored(name)}\n<!-- /{name} -->"


def gpu() -> str:
    """What `benchmarks/gpu.sh` has left, as far as it was run."""
    there = [name for name in GPU if (RESULTS / f"{name}.json").is_file()]
    return "\n\n".join(map(stored, there)) or "No GPU has run it yet."


def stored(name: str) -> str:
    """The table of a stored result, with where and how it was made."""
    content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    where = f"{content['device']}, torch {content['torch']}; `python -m {content['command']}`"
    return f"{KINDS[name.split('_')[0]](content)}\n\n{where}"


def updated(text: str) -> str:
    """A document's text with every table made anew."""
    return _REGION.sub(lambda region: render(region[1]), text)


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
    raise SystemExit(command.run(main, log_format=None))
