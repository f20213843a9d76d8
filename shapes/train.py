"""The command line of training: `python -m shapes.train {vae,dit,export} --work FOLDER`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from shapes.dit_training import DiTRecipe, train_dit
from shapes.export import export
from shapes.vae import VAERecipe, train_vae


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["vae", "dit", "export"])
    parser.add_argument("--work", type=Path, default=Path("demo/shapes_training"), help="states and logs go there")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/shapes"), help="where export writes")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--until", type=int, help="stop before this step; the same command without it goes on")
    parser.add_argument("--batch", type=int, help="clips a step, instead of the recipe's")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    changes = {"steps": args.steps} if args.steps else {}
    if args.batch:
        changes["batch"] = args.batch
    if args.stage == "vae":
        train_vae(args.work, replace(VAERecipe(compile=not args.no_compile), **changes), args.until)
    if args.stage == "dit":
        train_dit(args.work, replace(DiTRecipe(), **changes), args.until)
    if args.stage == "export":
        export(args.work, args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
