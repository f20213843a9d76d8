"""What is to be seen of a world from frame to frame: a scene and what commands make of it, as tracks of its things."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shapes.world import FRAMES, Command, Floats, Hidden, Scene, Track, World, begin


@dataclass(frozen=True)
class Film:
    """Everything that is to be seen: tracks in the order in which things came (a later one lies over an earlier one),
    `backdrop` [frames, BACKGROUNDS], and the mark that all things bear."""

    tracks: tuple[Track, ...]
    backdrop: Floats
    mark: int

    def __len__(self) -> int:
        return len(self.backdrop)

    def cut(self, first: int, stop: int) -> Film:
        return Film(tuple(track.cut(first, stop) for track in self.tracks), self.backdrop[first:stop], self.mark)


def film(scene: Scene, hidden: Hidden, frames: int = FRAMES, commands: Sequence[tuple[int, Command]] = ()) -> Film:
    """A scene and what becomes of it; a command takes effect at its pixel frame."""
    world, start = begin(scene, hidden), 0
    found: dict[int, list[tuple[int, Track]]] = {}
    backdrops: list[Floats] = []
    for stop, command in (*commands, (frames, None)):
        length = stop - start
        for body in world.bodies:
            found.setdefault(body.number, []).append((start, body.track(length)))
        backdrops.append(world.backdrop.at(np.arange(length, dtype=np.float32)))
        world, start = world.later(length), stop
        world = world.obey(command) if command else world
    tracks = tuple(_joined(parts, frames) for _, parts in sorted(found.items()))
    return Film(tracks, np.concatenate(backdrops), hidden.mark)


def world_at(scene: Scene, hidden: Hidden, commands: Sequence[tuple[int, Command]], frame: int) -> World:
    """The world at a pixel frame, under those commands that come before it."""
    world, now = begin(scene, hidden), 0
    for start, command in commands:
        if start >= frame:
            break
        world, now = world.later(start - now).obey(command), start
    return world.later(frame - now)


def _joined(parts: Sequence[tuple[int, Track]], frames: int) -> Track:
    """One track of the stretches in which a thing is there; elsewhere its radius is 0."""
    first = parts[0][1]
    whole = {name: np.zeros((frames, *value.shape[1:]), value.dtype) for name, value in vars(first).items()}
    for start, part in parts:
        for name, value in vars(part).items():
            whole[name][start : start + len(part.x)] = value
    return Track(**whole)


def tracks(scene: Scene, hidden: Hidden, frames: int = FRAMES) -> tuple[Track, ...]:
    """The tracks of a first scene's things."""
    return tuple(body.track(frames) for body in begin(scene, hidden).bodies)
