"""Storyboards and long videos against the world's laws: is every scene right, and does it last?

A scene is what happens from one caption to the next. What a caption asks for takes a block; after it, colours, shapes,
motions and the background must be as the world has them, and nothing else may be there. What no caption says is the
video's own choice: it is read off the first block, and all scenes are held to it. Numbers are read off the pixels by
`shapes.measure`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shapes.data import Clip
from shapes.film import world_at
from shapes.measure import (
    LEAST_AREA,
    SATURATED,
    Masks,
    Seen,
    brightness_change,
    drift,
    nearest_colour,
    saturated,
    see,
    which_background,
    wrapped,
)
from shapes.score import LAST, chosen, distance
from shapes.world import BACKGROUNDS, COLOURS, FRAMES, HEIGHT, WIDTH, Body, Floats, Hidden, Track, World, begin
from utils.errors import InputError

SETTLED = 12  # pixel frames, a block, after which a caption must have been obeyed
PATH_ERROR = 4.0  # pixels, from where it was when the caption had been obeyed: up to here a motion is right
SIZE_ERROR = 0.13  # of the radius; sizes are at least a sixth apart
SECOND = 16  # pixel frames
GREY = 0.1  # more saturation than what can just be seen: there a video may be a frame early or late
ANCHOR = 4  # pixel frames whose mean place is where a thing was


@dataclass(frozen=True)
class SceneScore:
    """Shares are 0 or 1; `position` is the mean distance in pixels from the place that the world's laws give."""

    colour: float
    shape: float
    motion: float
    background: float
    position: float

    @property
    def right(self) -> float:
        return min(self.colour, self.shape, self.motion, self.background)


def score_scenes(video: Floats, clip: Clip) -> list[SceneScore]:
    """Every scene of a video [frames, H, W, 3] in 0..1, the first one too. Raises InputError for one that is over
    before it has settled."""
    starts = [start for start, _ in clip.script]
    bounds = list(zip([0, *starts], [*starts, len(video)], strict=True))
    shortest = min(stop - start for start, stop in bounds)
    if shortest <= SETTLED:
        raise InputError(f"a scene of {shortest} pixel frames cannot be scored; give every scene more than {SETTLED}")
    found = chosen(video, clip.scene)
    parts = [video[start:stop] for start, stop in bounds]
    worlds = _worlds(clip, found or Hidden())
    return [score_scene(part, world, found is not None) for part, world in zip(parts, worlds, strict=True)]


def last_scene(video: Floats, clip: Clip) -> tuple[SceneScore, list[Found]]:
    """A storyboard's last scene, and what it is scored by."""
    found = chosen(video, clip.scene)
    part, world = video[clip.script[-1][0] :], _worlds(clip, found or Hidden())[-1]
    things = _found_things(part, world)
    return _scored(things, part, world, found is not None), things


def _worlds(clip: Clip, hidden: Hidden) -> list[World]:
    """With which every scene begins."""
    later = [world_at(clip.scene, hidden, clip.script, start).obey(command) for start, command in clip.script]
    return [begin(clip.scene, hidden), *later]


def score_scene(part: Floats, world: World, known: bool) -> SceneScore:
    """A scene's frames against the world with which it begins. `known`: whether the video's first background was one of
    the world's; otherwise none is right."""
    return _scored(_found_things(part, world), part, world, known)


def _scored(found: Sequence[Found], part: Floats, world: World, known: bool) -> SceneScore:
    end = part[SETTLED:][-LAST:]
    return SceneScore(
        colour=float(_colours_are_right(end, [thing.track.cut(-LAST, None) for thing in found])),
        shape=float(all(thing.seen.shape == thing.body.shape for thing in found)),
        motion=float(all(thing.off_path < PATH_ERROR and abs(thing.off_size) < SIZE_ERROR for thing in found)),
        background=float(known and which_background(end) == BACKGROUNDS.index(world.background)),
        position=float(np.mean([distance(thing.seen, thing.track)[thing.shown].mean() for thing in found])),
    )


@dataclass(frozen=True)
class Found:
    """A thing of the world, how it is seen, and how it should be, in the frames after a caption has been obeyed.
    `shown` [frames]: see `_shown`."""

    body: Body
    seen: Seen
    track: Track
    shown: Masks

    @property
    def off_path(self) -> float:
        """Mean distance in pixels from the track as it goes on from where the thing was first seen; NaN if there is
        none."""
        dx = wrapped(self.seen.x[self.shown] - self.track.x[self.shown], WIDTH)
        dy = wrapped(self.seen.y[self.shown] - self.track.y[self.shown], HEIGHT)
        dx, dy = wrapped(dx - dx[:ANCHOR].mean(), WIDTH), wrapped(dy - dy[:ANCHOR].mean(), HEIGHT)
        return float(np.hypot(dx, dy).mean())

    @property
    def off_size(self) -> float:
        """How much larger it is in the end than it should be, as a share of its radius."""
        seen, true = (one.radius[self.shown][-LAST:].mean() for one in (self.seen, self.track))
        return float(seen) / float(true) - 1


def _found_things(part: Floats, world: World) -> list[Found]:
    """What is there of a world's things in a scene's frames, from SETTLED on."""
    only = [body.colour if len(world.there) > 1 else None for body in world.there]
    found = []
    for body, colour in zip(world.there, only, strict=True):
        track = body.track(len(part)).cut(SETTLED, len(part))
        found.append(Found(body, see(part[SETTLED:], colour), track, _shown(track, colour)))
    return found


def _shown(track: Track, only: str | None) -> Masks:
    """The frames in which a thing has a colour by which it can be seen, which is `only` where there are two: on its way
    to another one it may pass grey. All of them where there would be none."""
    found = saturated(track.colour, SATURATED + GREY)
    if only is not None:
        found &= nearest_colour(track.colour) == list(COLOURS).index(only)
    return found if found.any() else np.ones_like(found)


def _colours_are_right(frames: Floats, things: Sequence[Track]) -> bool:
    """Whether in most frames exactly the colours that these things have by then are there."""
    masks, colours = saturated(frames), nearest_colour(frames)
    areas = np.stack([(masks & (colours == i)).sum((1, 2)) for i in range(len(COLOURS))], axis=1)
    tints = [np.where(saturated(track.colour), nearest_colour(track.colour), -1) for track in things]
    wanted = np.stack([np.any([tint == i for tint in tints], axis=0) for i in range(len(COLOURS))], axis=1)
    return bool(((areas >= LEAST_AREA) == wanted).all(1).mean() >= 0.5)


@dataclass(frozen=True)
class LongScore:
    """How a long video ends. Shares are 0 or 1, of the last five seconds; `still`: PSNR in dB of the background between
    frames a second apart, at its worst; `drift`: between the first block and the end; `brightness`: by how much the
    background has become brighter or darker, in % of the whole range; `hue`: by how much a thing's colour has changed,
    the largest change of a channel in % of the range."""

    colour: float
    shape: float
    motion: float
    background: float
    still: float
    drift: float
    brightness: float
    hue: float

    @property
    def right(self) -> float:
        return min(self.colour, self.shape, self.motion, self.background)


def score_long(video: Floats, clip: Clip) -> LongScore:
    """A video of one scene, of ten seconds or more."""
    start, end = len(video) - FRAMES, len(video) - 1
    found = chosen(video, clip.scene)
    last = score_scene(video[start:], world_at(clip.scene, found or Hidden(), (), start), found is not None)
    return LongScore(
        *(last.colour, last.shape, last.motion, last.background),
        still=min(drift(video, at, at + SECOND) for at in range(0, len(video) - SECOND, SECOND)),
        drift=drift(video, 0, end),
        brightness=100 * abs(brightness_change(video, 0, end)),
        hue=100 * _hue_change(video[FRAMES - SECOND : FRAMES], video[-SECOND:]),
    )


def _hue_change(early: Floats, late: Floats) -> float:
    """Between the mean colours of what is a thing in each; NaN if none is there."""
    means = [part[saturated(part)] for part in (early, late)]
    if min(map(len, means)) < LEAST_AREA:
        return float("nan")
    return float(np.abs(means[0].mean(0) - means[1].mean(0)).max())
