"""The world that the small model is trained on: flat shapes that move over a still background, drawn exactly.

A `Scene` is what a caption says: which things, and what they do. `Hidden` is what no caption says and what a video
must therefore keep from its own first frames: the background, a mark on the things, which way round they go. A scene
and its hidden part decide every pixel. The file knows no wording and no model.
Units: pixels (x to the right, y down, pixel centres at .5) and pixel frames at 16 a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

HEIGHT, WIDTH = 80, 128
FRAMES = 81
LANES = (26.0, 54.0)  # y of two things that pass each other
MARGIN = 18.0  # a thing's centre turns back at this distance from a wall

SHAPES = ("disc", "square", "triangle", "cross")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.12, 0.12),
    "orange": (1.0, 0.55, 0.05),
    "yellow": (0.98, 0.92, 0.15),
    "green": (0.12, 0.68, 0.22),
    "blue": (0.12, 0.28, 0.92),
    "purple": (0.66, 0.15, 0.82),
}
SIZES = {"small": 12.0, "medium": 15.0, "large": 18.0}  # half the side of a square of equal extent
CROSS = (1.15, 0.4)  # half the length and half the width of its arms; its area is near the others'
DIRECTIONS = {"right": (1.0, 0.0), "left": (-1.0, 0.0), "down": (0.0, 0.55), "up": (0.0, -0.55)}  # pixels a frame
MOTIONS = (*DIRECTIONS, "bounce", "orbit", "grow", "shrink", "turn", "still", "pass")
LATER_MOTIONS = (*DIRECTIONS, "grow", "shrink", "turn", "still")  # what may follow a prompt switch
BACKGROUNDS = 4
MARKS = ("none", "white", "black")
SMALLEST, LARGEST = 10.0, 21.0  # where shrinking and growing end
TURN_FRAMES = (16, 48)  # a colour changes between these frames of its scene


@dataclass(frozen=True)
class Thing:
    """A shape (of SHAPES) with a colour (of COLOURS) and a size (of SIZES)."""

    shape: str
    colour: str
    size: str = "medium"


@dataclass(frozen=True)
class Scene:
    """One thing that does `motion`, or two for "pass": the first moves right, the second left, one above the other.

    `target` is the colour that "turn" ends in.
    """

    things: tuple[Thing, ...]
    motion: str
    target: str | None = None


@dataclass(frozen=True)
class Hidden:
    """What no caption says. `background` < BACKGROUNDS, `mark` indexes MARKS, `way` is 0 or 1: in an orbit against the
    clock or with it; who takes the upper lane when two pass each other."""

    background: int = 0
    mark: int = 0
    way: int = 0


@dataclass(frozen=True)
class Track:
    """Where a thing is and what it looks like in every frame: x, y, radius [frames], colour [frames, 3] in 0..1."""

    shape: str
    x: Floats
    y: Floats
    radius: Floats
    colour: Floats


@dataclass(frozen=True)
class _State:
    x: float
    y: float
    radius: float
    colour: tuple[float, float, float]


def as_floats(values: npt.ArrayLike) -> Floats:
    return np.asarray(values, np.float32)


def tracks(scene: Scene, hidden: Hidden, frames: int = FRAMES) -> tuple[Track, ...]:
    """The tracks of a scene's things from its beginning on."""
    if scene.motion == "pass":
        right, left = (Scene((thing,), motion) for thing, motion in zip(scene.things, ("right", "left"), strict=True))
        lanes = LANES if hidden.way == 0 else LANES[::-1]
        starts = (replace(_start(one), y=lane) for one, lane in zip((right, left), lanes, strict=True))
        return tuple(_go(one, start, hidden, frames) for one, start in zip((right, left), starts, strict=True))
    return (_go(scene, _start(scene), hidden, frames),)


def story(scenes: Sequence[tuple[int, Scene]], hidden: Hidden, frames: int = FRAMES) -> tuple[Track, ...]:
    """A track for scenes that follow each other; scenes[i] begins at pixel frame scenes[i][0], the first at 0.

    A later scene takes its thing over where and as the one before has left it.
    """
    if len(scenes) == 1:
        return tracks(scenes[0][1], hidden, frames)
    ends = [start for start, _ in scenes[1:]] + [frames]
    parts: list[Track] = []
    for (start, scene), end in zip(scenes, ends, strict=True):
        length = end - start + 1  # one frame more than is kept: where the next scene begins
        parts.append(_go(scene, _end(parts[-1]), hidden, length) if parts else tracks(scene, hidden, length)[0])
    fields = [np.concatenate([getattr(part, name)[:-1] for part in parts]) for name in ("x", "y", "radius", "colour")]
    return (Track(scenes[0][1].things[0].shape, *fields),)


def _end(track: Track) -> _State:
    red, green, blue = (float(value) for value in track.colour[-1])
    return _State(float(track.x[-1]), float(track.y[-1]), float(track.radius[-1]), (red, green, blue))


def _start(scene: Scene) -> _State:
    (thing,) = scene.things
    middle = WIDTH / 2
    places = {
        "right": (24.0, HEIGHT / 2),
        "left": (WIDTH - 24.0, HEIGHT / 2),
        "down": (middle, 18.0),
        "up": (middle, HEIGHT - 18.0),
        "bounce": (middle, HEIGHT - 20.0),
        "orbit": (middle, 20.0),
    }
    x, y = places.get(scene.motion, (middle, HEIGHT / 2))
    radius = {"grow": SMALLEST, "shrink": LARGEST}.get(scene.motion, SIZES[thing.size])
    return _State(x, y, radius, COLOURS[thing.colour])


def _go(scene: Scene, start: _State, hidden: Hidden, frames: int) -> Track:
    t = np.arange(frames, dtype=np.float32)
    x, y = np.full(frames, start.x, np.float32), np.full(frames, start.y, np.float32)
    radius = np.full(frames, start.radius, np.float32)
    colour = np.tile(np.array(start.colour, np.float32), (frames, 1))
    motion = scene.motion
    if motion in DIRECTIONS:
        speed = DIRECTIONS[motion]
        x, y = _reflect(x + speed[0] * t, WIDTH), _reflect(y + speed[1] * t, HEIGHT)
    elif motion == "bounce":
        y = y - 34.0 * np.abs(np.sin(t * np.float32(math.pi / 40)))
    elif motion == "orbit":
        angle = t * np.float32(2 * math.pi / 96) * (1 if hidden.way else -1)
        x, y = WIDTH / 2 + 28.0 * np.sin(angle), HEIGHT / 2 - 20.0 * np.cos(angle)
    elif motion in ("grow", "shrink"):
        end = LARGEST if motion == "grow" else SMALLEST
        rate = (LARGEST - SMALLEST) / 64
        radius = np.minimum(radius + rate * t, max(end, start.radius)) if motion == "grow" else radius
        radius = np.maximum(radius - rate * t, min(end, start.radius)) if motion == "shrink" else radius
    elif motion == "turn":
        assert scene.target is not None
        share = np.clip((t - TURN_FRAMES[0]) / (TURN_FRAMES[1] - TURN_FRAMES[0]), 0, 1)[:, None]
        colour = colour + share * (np.array(COLOURS[scene.target], np.float32) - colour)
    return Track(scene.things[0].shape, x.astype(np.float32), y.astype(np.float32), radius, colour.astype(np.float32))


def _reflect(position: Floats, size: int) -> Floats:
    """Positions on a line folded back between the walls."""
    span = size - 2 * MARGIN
    folded = np.abs((position - MARGIN + span) % (2 * span) - span)
    return as_floats(folded + MARGIN)


@lru_cache(maxsize=BACKGROUNDS)
def background(index: int) -> Floats:
    """[HEIGHT, WIDTH, 3] in 0..1, greyish. Edges lie on multiples of 8 pixels, the VAE's raster."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    light, dark = {
        0: ((0.80, 0.79, 0.75), (0.80, 0.79, 0.75)),
        1: ((0.22, 0.24, 0.28), (0.22, 0.24, 0.28)),
        2: ((0.74, 0.80, 0.84), (0.46, 0.42, 0.36)),
        3: ((0.62, 0.60, 0.58), (0.40, 0.40, 0.42)),
    }[index]
    zero = np.zeros((HEIGHT, WIDTH), bool)
    where = {2: y >= 56, 3: (x // 16) % 2 == 1}.get(index, zero)
    return as_floats(np.where(where[..., None], dark, light))


def distance(shape: str, x: Floats, y: Floats, radius: Floats | float) -> Floats:
    """Signed distance in pixels (negative inside) of points relative to the centre; exact near the edges."""
    if shape == "disc":
        return as_floats(np.sqrt(x * x + y * y) - radius)
    if shape == "square":
        return as_floats(np.maximum(np.abs(x), np.abs(y)) - 0.9 * radius)
    if shape == "cross":
        long, short = CROSS[0] * radius, CROSS[1] * radius
        across, along = np.maximum(np.abs(x) - long, np.abs(y) - short), np.maximum(np.abs(x) - short, np.abs(y) - long)
        return as_floats(np.minimum(across, along))
    assert shape == "triangle", shape
    # Upright: the base 0.75 radius below the centre, the tip 1.1 above it.
    slope = math.sqrt(1 + 0.6**2)
    return as_floats(np.maximum(y - 0.75 * radius, (np.abs(x) - 0.6 * (y + 1.1 * radius)) / slope))


def coverage(shape: str, x: Floats, y: Floats, radius: Floats | float) -> Floats:
    """How much of the pixel at these points relative to the centre the shape covers, 0..1."""
    return as_floats(np.clip(0.5 - distance(shape, x, y, radius), 0.0, 1.0))


def render(things: Sequence[Track], hidden: Hidden) -> Floats:
    """Frames [frames, HEIGHT, WIDTH, 3] in 0..1; a later thing lies over an earlier one."""
    frames = np.repeat(background(hidden.background)[None], len(things[0].x), axis=0)
    for track in things:
        _draw(frames, track, track.shape, 1.0, track.colour)
        if hidden.mark:
            shade = np.full_like(track.colour, 0.97 if MARKS[hidden.mark] == "white" else 0.06)
            _draw(frames, track, "disc", 0.4, shade)
    return frames


def _draw(frames: Floats, track: Track, shape: str, scale: float, colour: Floats) -> None:
    """Blend a shape of `scale` times the track's radius into every frame, touching only the pixels around it."""
    half = math.ceil(float(track.radius.max()) * 1.15 * scale) + 2
    left, top = np.floor(track.x).astype(int) - half, np.floor(track.y).astype(int) - half
    grid = np.arange(2 * half, dtype=np.float32) + 0.5
    dx = (left[:, None] + grid - track.x[:, None])[:, None, :]
    dy = (top[:, None] + grid - track.y[:, None])[:, :, None]
    cover = coverage(shape, dx, dy, (track.radius * np.float32(scale))[:, None, None])[..., None]
    for frame, i, j, alpha, shade in zip(frames, top, left, cover, colour, strict=True):
        rows, columns = slice(max(i, 0), max(i + 2 * half, 0)), slice(max(j, 0), max(j + 2 * half, 0))
        part = frame[rows, columns]
        cut = alpha[max(-i, 0) :][: part.shape[0], max(-j, 0) :][:, : part.shape[1]]
        part += cut * (shade - part)
