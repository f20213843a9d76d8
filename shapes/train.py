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
from utils.files import ensure_writable_folder
from utils.lock import RunLock


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["text", "vae", "dit", "export"])
    parser.add_argument("--work", type=Path, default=Path("demo/shapes_training"), help="states and logs go there")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/shapes"), help="where export writes")
    parser.add_argument("--steps", type=command.count, help="instead of the recipe's")
    parser.add_argument(
        "--until", type=command.count, help="stop before this step; the same command without it goes on"
    )
    parser.add_argument("--batch", type=command.count, help="clips a step (2 or more), instead of the recipe's")
    parser.add_argument("--wide", type=command.count, help="dit: so many times the recipe's clips a step, for a GPU")
    parser.add_argument("--seed", type=command.count, help="dit: train on other clips than without it")
    parser.add_argument(
        "--start-from", type=Path, metavar="FOLDER", help="dit: begin with the transformer of a finished model"
    )
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args(argv)
    for option in ("wide", "seed", "start_from"):
        if args.stage != "dit" and getattr(args, option) is not None:
            parser.error(f"--{option.replace('_', '-')} is of dit alone; leave it out of {args.stage}")
    for option in ("steps", "until", "batch", "no_compile"):
        if args.stage == "export" and getattr(args, option):
            parser.error(f"--{option.replace('_', '-')} is of training; leave it out of export")
    if args.batch is not None and args.batch < PARTS:
        parser.error(f"--batch {args.batch}: at least {PARTS}, since every step is computed in {PARTS} parts")
    log_to_stdout()
    if "OMP_NUM_THREADS" not in os.environ:  # which PyTorch has read
        torch.set_num_threads(2)
    if args.stage == "export":
        export(args.work, args.out)
        return 0
    ensure_writable_folder(args.work, "--work")
    busy = f"--work: another run trains {args.stage} in {args.work}; wait for its end, or give another folder."
    with RunLock(args.work / f".{args.stage}.lock", busy) as lock:
        lock.begin(f"process {os.getpid()}")
        _train(args)
    return 0


def _train(args: argparse.Namespace) -> None:
    given = {"steps": args.steps, "batch": args.batch}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value}
    if args.stage == "text":
        train_text(args.work, replace(ReadingRecipe(), **changes), args.until)
    changes["compile"] = not args.no_compile
    if args.stage == "vae":
        train_vae(args.work, replace(VAERecipe(), **changes), args.until)
    if args.stage == "dit":
        changes |= {name: getattr(args, name) for name in ("wide", "seed") if getattr(args, name)}
        train_dit(args.work, replace(DiTRecipe(), **changes), args.until, args.start_from)


if __name__ == "__main__":
    raise SystemExit(command.run(main, log_format=None))
