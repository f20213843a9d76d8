"""Captions as training has them, none of the held-out ones: python -m shapes.training_captions --count 8 --out FILE

One a line, a prompt file. Calibrating and everything else that is fitted to the small model goes by these, so that what
is measured on held-out captions is fitted to nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from shapes.data import make_clip
from utils.files import write_atomic

SEED = 33  # of no clip of evaluation, which has held-out ones
FRAMES = 1  # of the clips that are made for their captions


def training_captions(count: int) -> list[str]:
    """Different ones, always the same."""

    def every() -> Iterator[str]:
        index = 0
        while True:
            yield make_clip(SEED, index, frames=FRAMES, held=False).captions[0]
            index += 1

    found: dict[str, None] = {}
    for caption in every():
        found[caption] = None
        if len(found) == count:
            return list(found)
    raise AssertionError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("prompts/shapes_training.txt"))
    args = parser.parse_args(argv)
    write_atomic(args.out, "".join(f"{caption}\n" for caption in training_captions(args.count)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
