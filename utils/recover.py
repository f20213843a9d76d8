"""`python -m utils.recover x.growing.mp4 ...`: videos from what killed runs left; see utils.growing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.command import run
from utils.errors import InputError
from utils.growing import recover
from utils.video_probe import probe


def main(argv: Sequence[str] | None = None) -> int:
    """Recover every file named in `argv`; one that cannot be does not stop the others. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.recover",
        description="Make ordinary videos, x.recovered.mp4, from the growing files that killed runs left.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a file that ends in .growing.mp4")
    arguments = parser.parse_args(argv)
    return run(lambda: recover_all(arguments.files))


def recover_all(files: Sequence[Path]) -> int:
    """Returns the exit status: 2 if one could not be recovered."""
    status = 0
    for growing in files:
        try:
            path = recover(growing)
            sys.stdout.write(f"{path}: {probe(path).frames} frames\n")
        except InputError as error:
            sys.stderr.write(f"{error}\n")
            status = 2
    return status


if __name__ == "__main__":
    sys.exit(main())
