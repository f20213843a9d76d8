"""The command line of training: `python -m shapes.train {text,vae,dit,export} --work FOLDER`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from shapes.batches import PARTS, DiTRecipe
from shapes.dit_training import train_dit
from shapes.export import export
from shapes.reading import ReadingRecipe, train_text
from shapes.runs import log_to_stdout
from shapes.vae import VAERecipe, train_vae
from utils import command


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["text", "vae", "dit", "export"])
    parser.add_argument("--work", type=Path, default=Path("demo/shapes_training"), help="states and logs go there")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/shapes"), help="where export writes")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--until", type=int, help="stop before this step; the same command without it goes on")
    parser.add_argument("--batch", type=int, help="clips a step (2 or more), instead of the recipe's")
    parser.add_argument("--wide", type=int, help="dit: so many times the recipe's clips a step, for a GPU")
    parser.add_argument(
        "--start-from", type=Path, metavar="FOLDER", help="dit: begin with the transformer of a finished model"
    )
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args(argv)
    if args.wide is not None and args.wide < 1:
        parser.error(f"--wide {args.wide}: at least 1, which is the recipe's number of clips")
    if args.batch is not None and args.batch < PARTS:
        parser.error(f"--batch {args.batch}: at least {PARTS}, since every step is computed in {PARTS} parts")
    log_to_stdout()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    given = {"steps": args.steps, "batch": args.batch}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value}
    if args.stage == "text":
        train_text(args.work, replace(ReadingRecipe(), **changes), args.until)
    changes["compile"] = not args.no_compile
    if args.stage == "vae":
        train_vae(args.work, replace(VAERecipe(), **changes), args.until)
    if args.stage == "dit":
        changes |= {"wide": args.wide} if args.wide else {}
        train_dit(args.work, replace(DiTRecipe(), **changes), args.until, args.start_from)
    if args.stage == "export":
        export(args.work, args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(command.run(main, log_format=None))
