"""How two roles files differ: python -m dummy.compare A B

A file is one of `python -m pipeline.atlas --roles` or the JSON that inference.py writes beside a video.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dummy.roles import HeadRoles, Role
from utils.command import run
from utils.errors import InputError


@dataclass(frozen=True)
class Difference:
    """`moves[a][b]`: heads with role a in the one file and b in the other; `changed`: (layer, head) of all others."""

    moves: dict[Role, dict[Role, int]]
    changed: tuple[tuple[int, int, Role, Role], ...]

    @property
    def heads(self) -> int:
        return sum(count for row in self.moves.values() for count in row.values())

    @property
    def dummy_overlap(self) -> float:
        """Twice the common dummy heads over the dummy heads of both; 1 if there are none."""
        both = self.moves[Role.DUMMY][Role.DUMMY]
        either = sum(self.moves[Role.DUMMY].values()) + sum(row[Role.DUMMY] for row in self.moves.values())
        return 2 * both / either if either else 1.0


def compare(one: HeadRoles, other: HeadRoles) -> Difference:
    """Of two sets of roles for models of one size."""
    moves = {a: dict.fromkeys(Role, 0) for a in Role}
    changed = []
    for layer, rows in enumerate(zip(one.table, other.table, strict=True)):
        for head, (a, b) in enumerate(zip(*rows, strict=True)):
            moves[a][b] += 1
            if a is not b:
                changed.append((layer, head, a, b))
    return Difference(moves, tuple(changed))


def text(difference: Difference) -> str:
    """The table of moves, the overlap, and the heads that differ, a line a layer."""
    corner = "A / B"
    lines = [f"{corner:12}" + "".join(f"{role.name.lower():>10}" for role in Role)]
    lines += [f"{a.name.lower():12}" + "".join(f"{row[b]:10}" for b in Role) for a, row in difference.moves.items()]
    same = difference.heads - len(difference.changed)
    lines.append(f"same role: {same} of {difference.heads} heads ({100 * same / difference.heads:.1f} %)")
    lines.append(f"overlap of the dummy sets: {difference.dummy_overlap:.3f}")
    for layer in sorted({layer for layer, *_ in difference.changed}):
        moves = [f"{head} {a.name.lower()} -> {b.name.lower()}" for at, head, a, b in difference.changed if at == layer]
        lines.append(f"layer {layer}: head " + ", ".join(moves))
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 for files that cannot be compared, which is said on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m dummy.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", type=Path, metavar="A")
    parser.add_argument("b", type=Path, metavar="B")
    arguments = parser.parse_args(argv)
    return run(lambda: show(arguments.a, arguments.b))


def show(a: Path, b: Path) -> int:
    """Print how the roles of two files differ. Raises InputError for files that cannot be compared."""
    one, other = (HeadRoles.read(path) for path in (a, b))
    if one.shape != other.shape:
        sizes = [f"{layers} layers of {heads} heads" for layers, heads in (one.shape, other.shape)]
        raise InputError(f"{b}: is for {sizes[1]}, {a} for {sizes[0]}; give roles of one model")
    sys.stdout.write(text(compare(one, other)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
