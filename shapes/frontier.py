"""Quality against cost: policies, budgets and lengths of context on the small trained model.

    python -m shapes.frontier --out FOLDER [--short] [--points NAME,NAME]
    python -m shapes.frontier --out FOLDER --from benchmarks/results/frontier.json

Every point gets the same captions and the same noise (shapes.evaluate). Writes frontier.json, frontier.md, and
frontier.svg with frontier.png: for each measure the points that no other beats at an equal or a smaller cost, and how
every point compares with the original's setting, caption by caption. frontier.json is written after every batch, so
that a sweep that is stopped leaves what it had. With --from a stored sweep is drawn anew.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dummy.config import ONLINE
from dummy.presets import PRESETS
from pipeline.config.config import load_config
from shapes import evaluate
from shapes.data import BLOCK, make_clip, pixel_frame
from shapes.frontier_plot import draw
from shapes.frontier_report import DENSE, ORIGINAL, Values, summary, table
from shapes.measure import psnr
from shapes.report import quality
from shapes.score import score
from utils import command
from utils.errors import InputError
from utils.files import ensure_writable_folder, write_atomic
from utils.plots import save

logger = logging.getLogger(__name__)

SHORT = (DENSE, ORIGINAL, "traded")
FROM = pixel_frame(2 * BLOCK)  # the first block that a split after block 1 can change
SHARES = (0.25, 0.75)  # of dummy heads, beside the usual half
ANCHORED_AT_COST = (19, 20)  # dummy heads of 24 with which `anchor` costs no more than `paper` with 12
# What costs the same (but for `calibrated 2`, which costs half of `window 7`), compared caption by caption.
COMPARED = (
    *(("calibrated 1.33", other) for other in (ORIGINAL, *(f"calibrated 1.33 R{n}" for n in (2, 3, 4)))),
    ("calibrated 1.67", "anchor"),
    ("calibrated 2", "window 5"),
    ("calibrated 2", "window 7"),
    ("calibrated 4", "window 7"),
    *(("calibrated 4", f"calibrated 4 R{n}") for n in (2, 3, 4)),
    ("calibrated 7", "window 10"),
    ("online 1.33", ORIGINAL),
    ("online 1.33", "calibrated 1.33"),
    ("online 2", "window 7"),
    ("online 4", "window 7"),
    ("online 4", "calibrated 4"),
)
FRAMES = (1, 1.33, 1.67, 2, 4, 7)  # a head of the calibrated policy
ONLINE_FRAMES = (1.33, 2, 4)  # with --batch 1, since the videos of a batch share what they show
LENGTHS = (2, 3, 4)  # different retentions in a layer
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
    for heads in ANCHORED_AT_COST:
        found[f"anchor {heads} of 24"] = [*found["anchor"], f"dummy_forcing.num_dummy={heads}"]
    equal = ["dummy_forcing.equal_cost=window", "model_kwargs.local_attn_size=7", "model_kwargs.sink_size=1"]
    found[f"{ORIGINAL} at window 7"] = [*found[ORIGINAL], *equal]
    for share in (*SHARES, 0.5):
        prune = [*evaluate.POLICIES["prune"], f"dummy_forcing.num_dummy={share}"]
        found[f"prune {100 * share:.0f}%"] = prune
    for frames in FRAMES:
        calibrated = evaluate.calibrated(frames)
        found[f"calibrated {frames:.3g}"] = calibrated
        for lengths in LENGTHS if frames in (FRAMES[1], 4) else ():
            found[f"calibrated {frames:.3g} R{lengths}"] = [*calibrated, f"dummy_forcing.max_lengths={lengths}"]
    for frames in ONLINE_FRAMES:
        found[f"online {frames:.3g}"] = evaluate.calibrated(frames, ONLINE)
    return found


def sweep(
    config_path: str, chosen: Mapping[str, Sequence[str]], args: argparse.Namespace
) -> Iterator[dict[str, Values]]:
    """Generate and score every point; the first is what the others' PSNR is against. Raises InputError.

    Batch by batch all points take turns, so that whatever else the machine does meets them all; what there is by then
    comes after every batch.
    """
    evaluate.check_scored(load_config(config_path, [*next(iter(chosen.values())), *args.set]))
    configs = {name: load_config(config_path, [*settings, *args.set]) for name, settings in chosen.items()}
    parts = evaluate.Parts.load(next(iter(configs.values())))
    clips = [make_clip(evaluate.CAPTION_SEED, index, held=True) for index in range(args.captions)] * args.seeds
    streams = {name: evaluate.generate(parts, config, clips, args.batch) for name, config in configs.items()}
    found = {name: Values() for name in chosen}
    for start in range(0, len(clips), args.batch):
        began, reference = time.monotonic(), None
        for name, stream in streams.items():
            batch, group = next(stream)
            found[name].add_batch(batch.block_ms, batch.context)
            for place, (video, clip) in enumerate(zip(batch.videos, group, strict=True)):
                row = evaluate.row_of(score(video, clip.scene))
                fidelity = math.nan if reference is None else psnr(video[FROM:], reference[place, FROM:])
                found[name].add({**row, "quality": quality(row), "psnr": fidelity})
            reference = batch.videos if reference is None else reference
        logger.info("videos %d to %d: %.0f s", start + 1, start + len(group), time.monotonic() - began)
        yield found


def stored(path: Path) -> dict[str, Any]:
    """A frontier.json. Raises InputError."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        table(content)  # every number is there
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"--from: {path} cannot be read as a frontier.json ({error}); make one without --from"
        ) from error
    return content


def run(args: argparse.Namespace, given: Sequence[str]) -> int:
    """Returns the exit status. Raises InputError."""
    ensure_writable_folder(args.out, "--out")
    if args.stored is None:
        every = points()
        names = args.points or (SHORT if args.short else every)
        chosen = {name: every[name] for name in dict.fromkeys([DENSE, *names])}
        content: dict[str, Any] = {}
        for found in sweep(args.config, chosen, args):
            content = {**evaluate.about("shapes.frontier", given), **summary(found, chosen, COMPARED)}
            write_atomic(args.out / "frontier.json", json.dumps(content, indent=1) + "\n")
    else:
        content = stored(args.stored)
    write_atomic(args.out / "frontier.md", table(content))
    save(draw(content), args.out, "frontier")
    sys.stdout.write(table(content))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 for input that must be mended, which is said on stderr."""
    given = list(sys.argv[1:] if argv is None else argv)
    args = _arguments(given)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    torch.set_num_threads(args.threads)
    return command.run(lambda: run(args, given), log_format=None)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo/shapes_frontier"), metavar="FOLDER")
    parser.add_argument(
        "--from", dest="stored", type=Path, metavar="JSON", help="only draw a stored frontier.json anew"
    )
    parser.add_argument("--short", action="store_true", help=f"three points ({', '.join(SHORT)}) and 8 captions")
    parser.add_argument("--points", type=_names, help=f"some of: {', '.join(points())}".replace("%", "%%"))
    parser.add_argument("--config", default=evaluate.CONFIG)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings for all points")
    parser.add_argument("--captions", type=command.count, help="held-out captions (default 64; 8 with --short)")
    parser.add_argument("--seeds", type=command.count, default=1, help="videos a caption, each with its own noise")
    parser.add_argument(
        "--batch", type=command.count, default=8, help="videos made together, which share their head roles"
    )
    parser.add_argument("--threads", type=command.count, default=2)
    args = parser.parse_args(argv)
    if args.captions is None:
        args.captions = 8 if args.short else 64
    return args


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in points()]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(map(repr, unknown))}: none of {', '.join(points())}")
    return names


if __name__ == "__main__":
    raise SystemExit(main())
