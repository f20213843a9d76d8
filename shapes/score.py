"""A video against its caption's scene: which of the things that the caption says are right, what is remembered.

The hidden part (background, mark, way round) is the video's own choice: it is read off the first block, and the
rest of the video is held to it. Numbers are NaN where they do not apply.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from shapes.data import pixel_frame
from shapes.film import tracks
from shapes.measure import Seen, drift, mark, seam, see, which_background, wrapped
from shapes.world import HEIGHT, MOTIONS, WIDTH, Floats, Hidden, Scene, Track, as_floats

FIRST_BLOCK = 9  # pixel frames
LAST = 12  # pixel frames at the end in which a remembered thing must still be there
MOTION_ERROR = 8.0  # pixels (radius differences counted twice) up to which a path is recognised
_WAYS = (Hidden(way=0), Hidden(way=1))
_WITH_WAYS = ("orbit", "pass")  # motions that go either way


@dataclass(frozen=True)
class Score:
    """Shares are 0 or 1. `position` is the mean distance from the world's own trajectory in pixels; `drift` the PSNR
    in dB of the background between the first and the last frame, `seam` the change across block borders over that
    within blocks."""

    colour: float
    shape: float
    motion: float
    position: float
    background: float
    mark: float
    way: float
    drift: float
    seam: float

    @property
    def remembered(self) -> float:
        """The mean of what applies of background, mark, way."""
        return float(np.nanmean([self.background, self.mark, self.way]))

    @classmethod
    def names(cls) -> list[str]:
        return [field.name for field in fields(cls)]


def score(video: Floats, scene: Scene) -> Score:
    """Video [frames, H, W, 3] in 0..1 against the scene that it should show."""
    seen = _things(video, scene)
    hidden = _way(seen, scene, FIRST_BLOCK)
    expected = tracks(scene, hidden, len(video))
    first, last = which_background(video[:FIRST_BLOCK]), which_background(video[-LAST:])
    marks = [(mark(video, one, 0, FIRST_BLOCK), mark(video, one, len(video) - LAST, len(video))) for one in seen]
    return Score(
        colour=_share(
            _colour_is_right(one, scene, thing.colour) for one, thing in zip(seen, scene.things, strict=True)
        ),
        shape=_share(one.shape == thing.shape for one, thing in zip(seen, scene.things, strict=True)),
        motion=_share(_motion(one, scene, i) == scene.motion for i, one in enumerate(seen)),
        position=float(np.mean([distance(one, track).mean() for one, track in zip(seen, expected, strict=True)])),
        background=float(first is not None and first == last),
        mark=_share(before is not None and before == after for before, after in marks),
        way=float(_way(seen, scene, LAST, last=True) == hidden) if scene.motion in _WITH_WAYS else math.nan,
        drift=drift(video, 0, len(video) - 1),
        seam=seam(video, borders(len(video))),
    )


def chosen(video: Floats, scene: Scene) -> Hidden | None:
    """The background and the way round that a video shows in its first block, the mark left out; None where the
    background is none of the world's."""
    first = video[:FIRST_BLOCK]
    background = which_background(first)
    if background is None:
        return None
    return replace(_way(_things(first, scene), scene, FIRST_BLOCK), background=background)


def _things(video: Floats, scene: Scene) -> list[Seen]:
    return [see(video, thing.colour if scene.motion == "pass" else None) for thing in scene.things]


def borders(frames: int) -> list[int]:
    """The first pixel frame of every block but the first."""
    return [start for start in (pixel_frame(3 * block) for block in range(1, 1000)) if start < frames]


def distance(seen: Seen, track: Track) -> Floats:
    """Pixels between the thing and where it should be [frames]; the frame's width where nothing is seen."""
    dx, dy = wrapped(seen.x - track.x, WIDTH), wrapped(seen.y - track.y, HEIGHT)
    return as_floats(np.nan_to_num(np.hypot(dx, dy), nan=float(WIDTH)))


def _share(values: Iterable[bool]) -> float:
    return float(np.mean(list(values)))


def _way(seen: Sequence[Seen], scene: Scene, frames: int, last: bool = False) -> Hidden:
    """The way that the first (or last) frames are nearest to, the same for all things."""
    part = slice(-frames, None) if last else slice(0, frames)

    def off(hidden: Hidden) -> float:
        expected = tracks(scene, hidden, len(seen[0].x))
        return sum(float(distance(one, track)[part].mean()) for one, track in zip(seen, expected, strict=True))

    return min(_WAYS, key=off)


def _colour_is_right(seen: Seen, scene: Scene, colour: str) -> bool:
    frames = len(seen.x)
    if scene.motion == "turn":
        return seen.colour(0, FIRST_BLOCK) == colour and seen.colour(frames - LAST, frames) == scene.target
    return seen.colour(0, frames) == colour


def _motion(seen: Seen, scene: Scene, index: int) -> str | None:
    """The motion whose path, either way round, is nearest to what is seen; None if none is near."""
    thing = scene.things[index]
    singles = [Scene((thing,), motion) for motion in MOTIONS if motion not in ("pass", "turn")]
    best, found = MOTION_ERROR, None
    for one in [*singles, *([scene] if scene.motion == "pass" else [])]:
        for hidden in _WAYS:
            track = tracks(one, hidden, len(seen.x))[index if one.motion == "pass" else 0]
            radii = np.nan_to_num(np.abs(seen.radius - track.radius), nan=20.0)
            off = float((distance(seen, track) + 2 * radii).mean())
            if off < best:
                best, found = off, one.motion
    start, end = seen.colour(0, FIRST_BLOCK), seen.colour(-LAST, len(seen.x))
    return "turn" if found == "still" and start != end and end is not None else found
