"""Where the things of a drawn video are, and films that go on from there.

A model's own video leaves its film bit by bit: a few pixels in a turn, and more over minutes. No viewer minds, and a
truth that stayed where the film began would only say so; one that follows says how things should look and move on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from shapes.film import Film
from shapes.measure import nearest_colour, see, which_background, wrapped
from shapes.world import COLOURS, HEIGHT, WIDTH, Floats, Track, as_floats

Shift = tuple[float, float]  # pixels to the right, and down

FAR = 16.0  # pixels; who has gone further within a turn did not go on
LAST = 4  # frames that tell where a thing is
TOUCHING = 1.2  # radii; nearer to another one a thing is hidden, or hides it


def shifted(film: Film, shifts: Sequence[Shift]) -> Film:
    """The film with every thing elsewhere; what crosses an edge goes on at the opposite one."""
    tracks = (
        replace(track, x=as_floats((track.x + dx) % WIDTH), y=as_floats((track.y + dy) % HEIGHT))
        for track, (dx, dy) in zip(film.tracks, shifts, strict=True)
    )
    return replace(film, tracks=tuple(tracks))


def anywhere(rng: np.random.Generator) -> Shift:
    """By which whatever is there may be elsewhere, since the world's laws are the same at every place."""
    return float(rng.uniform(0, WIDTH)), float(rng.uniform(0, HEIGHT))


def added(shifts: Sequence[Shift], moves: Sequence[Shift]) -> list[Shift]:
    return [(x + dx, y + dy) for (x, y), (dx, dy) in zip(shifts, moves, strict=True)]


def moved(film: Film, video: Floats) -> list[Shift] | None:
    """How far things are from where a film has them, at the end of a video [frames, H, W, 3] in 0..1 whose last frames
    are its own last; None if one is missing or far away, or all are before another background. What is not there has
    moved like the first thing that is, beside which it will come, if at all; who touches another one has not moved."""
    if which_background(video[-LAST:]) != int(film.backdrop[-1].argmax()):
        return None
    tracks = [track.cut(-LAST, None) for track in film.tracks]
    there = [i for i, track in enumerate(tracks) if track.radius[-1] > 0]
    moves = {}
    for i in there:
        others = [tracks[j] for j in there if j != i]
        dx, dy = _off(tracks[i], video[-LAST:], alone=not others)
        if np.isnan(dx) or np.hypot(dx, dy) > FAR:
            return None
        moves[i] = (0.0, 0.0) if any(_touch(tracks[i], other) for other in others) else (dx, dy)
    first = moves[there[0]] if there else (0.0, 0.0)
    return [moves.get(i, first) for i in range(len(tracks))]


def _off(track: Track, video: Floats, alone: bool) -> Shift:
    """How far a thing is from its track, as a mean over frames; NaN where it is not to be seen."""
    colour = list(COLOURS)[int(nearest_colour(track.colour[-1]))]
    seen = see(video, None if alone else colour)
    dx, dy = wrapped(seen.x - track.x, WIDTH), wrapped(seen.y - track.y, HEIGHT)
    return float(dx.mean()), float(dy.mean())


def _touch(one: Track, other: Track) -> bool:
    dx, dy = wrapped(one.x - other.x, WIDTH)[-1], wrapped(one.y - other.y, HEIGHT)[-1]
    return bool(np.hypot(dx, dy) < TOUCHING * (one.radius[-1] + other.radius[-1]))
