"""Long context at the cost of a dense setting: what sink and dummy heads save goes to the neighbour heads' history.

A block's operations are those of its own tokens plus, for every frame that a head keeps, the same amount once more
(`wan.transformer.operations`). Two settings of one model cost the same if their heads keep equally many frames in all;
so frames are counted here, and neither operations nor seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dummy.roles import Role
from wan.attention.head_group import UNBOUNDED, Retention


@dataclass(frozen=True)
class EqualCost:
    """`frames`: earlier frames that a steady block may cost, as a mean over all heads; UNBOUNDED for full history."""

    frames: float

    def fit(self, by_role: Mapping[Role, Retention], counts: Mapping[Role, int]) -> dict[Role, Retention]:
        """The retentions with as many recent frames for neighbour heads as `frames` allows with so many heads a role.

        For example 180 dummy, 131 sink and 49 neighbour heads, all of them with one frame but the last, have room for
        59 frames each where dense heads see 9 (arXiv 2601.20499 speaks of 6.58 times as many). Where a run finds no
        neighbour head, nobody is there to take what the others save, and retentions stay as they are.
        """
        neighbors, neighbor = counts[Role.NEIGHBOR], by_role[Role.NEIGHBOR]
        if not neighbors:
            return dict(by_role)
        if self.frames >= UNBOUNDED:
            return {**by_role, Role.NEIGHBOR: Retention(neighbor.sink, UNBOUNDED)}
        spent = sum(counts[role] * by_role[role].total for role in (Role.SINK, Role.DUMMY))
        room = int((self.frames * sum(counts.values()) - spent) // neighbors) - neighbor.sink
        return {**by_role, Role.NEIGHBOR: Retention(neighbor.sink, max(room, 0))}


def mean_frames(by_role: Mapping[Role, Retention], counts: Mapping[Role, int]) -> float:
    """Earlier frames that a head keeps once there are enough of them, as a mean over all heads."""
    return sum(counts[role] * by_role[role].total for role in Role) / sum(counts.values())
