"""Captions as training has them, none of the held-out ones: python -m shapes.training_captions --count 8 --out FILE

One a line, a prompt file. Calibrating and everything else that is fitted to the small model goes by these, so that what
is measured on held-out captions is fitted to nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from shapes.data import make_clip
from utils import command
from utils.errors import InputError
from utils.files import ensure_writable, write_atomic

SEED = 33  # of no clip of evaluation, which has held-out ones
IN_VAIN = 1000  # clips without a new caption, after which there are no others
FRAMES = 1  # of the clips that are made for their captions


def training_captions(count: int) -> list[str]:
    """Different ones, always the same. Raises InputError if there are not so many."""
    found: dict[str, None] = {}
    index = new = 0
    while len(found) < count:
        caption = make_clip(SEED, index, frames=FRAMES, held=False).captions[0]
        if caption not in found:
            found[caption], new = None, index
        if index - new > IN_VAIN:
            raise InputError(f"--count: only {len(found)} captions are found; give no more than that")
        index += 1
    return list(found)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=command.count, default=8)
    parser.add_argument("--out", type=Path, default=Path("prompts/shapes_training.txt"))
    args = parser.parse_args(argv)
    ensure_writable(args.out)
    write_atomic(args.out, "".join(f"{caption}\n" for caption in training_captions(args.count)))
    return 0


if __name__ == "__main__":
    raise SystemExit(command.run(main))
