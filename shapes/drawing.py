"""How the world looks: frames of a film, drawn exactly. The picture has no border: what crosses an edge goes on at the
opposite one."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from shapes.film import Film
from shapes.world import BACKGROUNDS, HEIGHT, MARKS, SHAPES, WIDTH, Floats, Track, as_floats

Places = npt.NDArray[np.int64]

CROSS = (1.15, 0.4)  # half the length and half the width of its arms; its area is near the others'
MARK = 0.4  # a mark's radius, of the thing's


@lru_cache(maxsize=len(BACKGROUNDS))
def background(index: int) -> Floats:
    """[HEIGHT, WIDTH, 3] in 0..1, greyish. Edges lie on multiples of 8 pixels, the VAE's raster."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    light, dark = {
        "light": ((0.80, 0.79, 0.75), (0.80, 0.79, 0.75)),
        "dark": ((0.22, 0.24, 0.28), (0.22, 0.24, 0.28)),
        "land": ((0.74, 0.80, 0.84), (0.46, 0.42, 0.36)),
        "stripes": ((0.62, 0.60, 0.58), (0.40, 0.40, 0.42)),
    }[BACKGROUNDS[index]]
    zero = np.zeros((HEIGHT, WIDTH), bool)
    where = {"land": y >= 56, "stripes": (x // 16) % 2 == 1}.get(BACKGROUNDS[index], zero)
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


def render(film: Film) -> Floats:
    """Frames [frames, HEIGHT, WIDTH, 3] in 0..1; a later thing lies over an earlier one."""
    frames = _backdrop(film.backdrop)
    for track in film.tracks:
        for start, stop in _stretches(track):
            part = track.cut(start, stop)
            _draw(frames[start:stop], part, 1.0, part.colour, None)
            if film.mark:
                shade = np.full_like(part.colour, 0.97 if MARKS[film.mark] == "white" else 0.06)
                _draw(frames[start:stop], part, MARK, shade, "disc")
    return frames


def _backdrop(weights: Floats) -> Floats:
    pictures = np.stack([background(index) for index in range(len(BACKGROUNDS))])
    frames = np.empty((len(weights), HEIGHT, WIDTH, 3), np.float32)
    for frame, row in zip(frames, weights, strict=True):
        sole = int(row.argmax())
        frame[:] = pictures[sole] if row[sole] == 1 else np.tensordot(row, pictures, 1)
    return frames


def _stretches(track: Track) -> list[tuple[int, int]]:
    """Frames in which a thing is there and keeps its pair of shapes."""
    kinds = np.where(track.radius >= 0.5, len(SHAPES) * track.before + track.after, -1)
    cuts = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
    return [(start, stop) for start, stop in pairwise(cuts) if kinds[start] >= 0]


def _draw(frames: Floats, track: Track, scale: float, colour: Floats, shape: str | None) -> None:
    """Blend the thing, or a `shape` in its place, of `scale` times its radius into every frame, touching only the
    pixels around it."""
    half = math.ceil(float(track.radius.max()) * 1.15 * scale) + 2
    left, top = np.floor(track.x).astype(int) - half, np.floor(track.y).astype(int) - half
    grid = np.arange(2 * half, dtype=np.float32) + 0.5
    dx = (left[:, None] + grid - track.x[:, None])[:, None, :]
    dy = (top[:, None] + grid - track.y[:, None])[:, :, None]
    radius = (track.radius * np.float32(scale))[:, None, None]
    cover = coverage(shape, dx, dy, radius) if shape else _cover(track, dx, dy, radius)
    rows, columns = (top[:, None] + np.arange(2 * half)) % HEIGHT, (left[:, None] + np.arange(2 * half)) % WIDTH
    for frame, i, j, alpha, shade in zip(frames, rows, columns, cover[..., None], colour, strict=True):
        _blend(frame, i, j, alpha, shade)


def _cover(track: Track, dx: Floats, dy: Floats, radius: Floats) -> Floats:
    before, after = (SHAPES[int(kind[0])] for kind in (track.before, track.after))
    off = distance(after, dx, dy, radius)
    if before != after:
        share = track.morph[:, None, None]
        off = as_floats((1 - share) * distance(before, dx, dy, radius) + share * off)
    return as_floats(np.clip(0.5 - off, 0.0, 1.0))


def _blend(frame: Floats, rows: Places, columns: Places, alpha: Floats, shade: Floats) -> None:
    if rows[0] < rows[-1] and columns[0] < columns[-1]:  # the usual case, several times as fast
        part = frame[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        part += alpha * (shade - part)
        return
    where = np.ix_(rows, columns)
    part = frame[where]
    frame[where] = part + alpha * (shade - part)
