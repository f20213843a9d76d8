"""What viewers are told about a session: what its heads keep, and its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline import Session
from studio.protocol import event


@dataclass(frozen=True)
class Heads:
    """`table[layer][head]` is the place in `kinds` of what the head keeps and holds; `roles[layer][head]` its role (0
    sink, 1 neighbour, 2 dummy) where heads have any. A kind: first frames, last frames, and the frames held now."""

    kinds: tuple[tuple[int, int, tuple[int, ...]], ...]
    table: tuple[tuple[int, ...], ...]
    roles: tuple[tuple[int, ...], ...] | None

    def event(self, take: int) -> str:
        kinds = [{"sink": sink, "recent": recent, "frames": frames} for sink, recent, frames in self.kinds]
        return event("heads", take=take, kinds=kinds, table=self.table, roles=self.roles)


def heads_of(session: Session) -> Heads:
    """Of a session between two blocks."""
    kinds: dict[tuple[int, int, tuple[int, ...]], int] = {}
    table = []
    for row in session.held():
        of_row = [(*(head.retention.sink, head.retention.recent), head.frames) for head in row]
        table.append(tuple(kinds.setdefault(kind, len(kinds)) for kind in of_row))
    roles = session.roles
    codes = None if roles is None else tuple(tuple(row) for row in roles.codes())
    return Heads(tuple(kinds), tuple(table), codes)


@dataclass(frozen=True)
class Numbers:
    """Of a session. Seconds and frames a second; None where nothing is known yet."""

    fps: float  # of the video
    transformer_fps: float | None
    end_to_end_fps: float | None  # what could be made, pictures and all
    playing_fps: float
    first_frame_s: float | None
    block_s: float | None
    frames: int
    lead_frames: int
    viewers: int
    lost_frames: Sequence[int]
    memory: dict[str, int | None]
    recording: str | None  # why it has stopped, if it has

    def event(self, take: int) -> str:
        real_time = None if self.end_to_end_fps is None else self.end_to_end_fps / self.fps
        rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in vars(self).items()}
        rounded["lost_frames"] = sum(self.lost_frames)
        return event("numbers", take=take, real_time=real_time and round(real_time, 3), **rounded)
