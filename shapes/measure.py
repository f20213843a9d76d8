"""What a video of the world shows, read off its pixels by plain image processing; no model, no caption.

Things are where colours are saturated, since backgrounds and marks are grey. A measure that cannot be taken (no thing
there, no background that fits) is None or NaN and counts as wrong wherever a right answer is wanted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shapes.drawing import CROSS, background, coverage
from shapes.world import BACKGROUNDS, COLOURS, SHAPES, Floats, as_floats

SATURATED = 0.3  # largest minus smallest channel of what belongs to a thing
LEAST_AREA = 60  # pixels; a thing of the smallest size covers about 200
BACKGROUND_ERROR = 0.06  # the median difference, 0..1, at which a background is still recognised
MARK_SHARE = 0.2  # of the radius: half the mark's own
FILLED = 0.5  # of the radius: so far from its centre every shape goes, and no mark reaches
EDGE = 2  # pixels by which a blurred edge goes beyond what is saturated
_CROSS_AREA = 8 * CROSS[0] * CROSS[1] - 4 * CROSS[1] ** 2
_AREAS = {"disc": math.pi, "square": 1.8**2, "triangle": 1.11 * 1.85, "cross": _CROSS_AREA}  # at radius 1
_CENTROIDS = {"triangle": 0.13}  # below the centre, at radius 1
_PALETTE = np.array(list(COLOURS.values()), np.float32)

Masks = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Seen:
    """A thing in every frame: x, y, radius [frames] in pixels, NaN where there is none; colour names or None."""

    shape: str | None
    x: Floats
    y: Floats
    radius: Floats
    colours: tuple[str | None, ...]

    def colour(self, first: int, stop: int) -> str | None:
        """The colour of most of these frames."""
        return most(self.colours[first:stop])


def most(names: Iterable[str | None]) -> str | None:
    """What at least half of the entries are."""
    entries = list(names)
    name, count = Counter(entries).most_common(1)[0]
    return name if 2 * count >= len(entries) else None


def saturated(video: Floats, least: float = SATURATED) -> Masks:
    """Colours [..., 3] in 0..1, a video's for example, to where they are those of things [...]."""
    masks: Masks = _saturation(video) > least
    return masks


def _saturation(video: Floats) -> Floats:
    return as_floats(video.max(-1) - video.min(-1))


def nearest_colour(video: Floats) -> npt.NDArray[np.int64]:
    """The palette's index of every pixel, by hue rather than brightness: channels are centred first."""
    centred, palette = (part - part.mean(-1, keepdims=True) for part in (video, _PALETTE))
    centred = centred / (np.linalg.norm(centred, axis=-1, keepdims=True) + 1e-6)
    palette = palette / np.linalg.norm(palette, axis=-1, keepdims=True)
    indices: npt.NDArray[np.int64] = (centred @ palette.T).argmax(-1)
    return indices


def see(video: Floats, only: str | None = None) -> Seen:
    """The thing in a video, or the one of colour `only` where there are two. It may lie across an edge."""
    things = masks = saturated(video)
    if only is not None:
        masks = things & (nearest_colour(video) == list(COLOURS).index(only))
    area = masks.sum((1, 2)).astype(np.float32)
    there = area >= LEAST_AREA
    x, y = (_bridged(np.where(there, _centres(masks.sum(axis)), np.nan), masks.shape[3 - axis]) for axis in (1, 2))
    shape = most(
        _shape(masks[i], float(x[i]), float(y[i]), float(area[i])) if there[i] else None
        for i in range(0, len(video), 4)
    )
    covered = np.where(there[:, None, None], _covered(video, masks, things), np.nan)
    radius = np.sqrt(covered.sum((1, 2)) / _AREAS[shape or "disc"])
    y = y - _CENTROIDS.get(shape or "", 0.0) * _bridged(radius)
    radius = _bridged(np.sqrt(_filled(covered, x, y, radius).sum((1, 2)) / _AREAS[shape or "disc"]))
    colours = tuple(_colour(frame, mask) if ok else None for frame, mask, ok in zip(video, masks, there, strict=True))
    return Seen(shape, x.astype(np.float32), y.astype(np.float32), radius.astype(np.float32), colours)


def _covered(video: Floats, masks: Masks, things: Masks) -> Floats:
    """How much of each pixel [frames, H, W] the thing of these masks covers, of all `things` in the picture: how far
    its saturation is on the way from that of the surroundings to the thing's own."""
    tint, near = _saturation(video), _grown(masks, EDGE) & ~(things & ~masks)
    around = ~_grown(things, EDGE)
    covered = np.zeros(masks.shape, np.float32)
    for i in np.flatnonzero(masks.any((1, 2)) & around.any((1, 2))):
        grey, own = np.median(tint[i][around[i]]), np.median(tint[i][masks[i]])
        covered[i] = np.where(near[i], (tint[i] - grey) / (own - grey), 0.0)
    return covered


def _filled(covered: Floats, x: Floats, y: Floats, radius: Floats) -> Floats:
    """With the middles of the things, which a mark may hide."""
    rows, columns = (np.arange(size, dtype=np.float32) + 0.5 for size in covered.shape[1:])
    dx, dy = (wrapped(at - place[:, None], len(at)) for at, place in ((columns, x), (rows, y)))
    middle = dx[:, None] ** 2 + dy[:, :, None] ** 2 <= (FILLED * radius[:, None, None]) ** 2
    return as_floats(np.where(middle, 1.0, covered))


def wrapped(difference: Floats, size: int) -> Floats:
    """A difference of places along an axis of `size` pixels whose ends meet, in -size / 2 to size / 2."""
    return as_floats((difference + size / 2) % size - size / 2)


def _centres(counts: npt.NDArray[np.int64]) -> Floats:
    """The centre of mass [frames] of counts [frames, size] along an axis whose ends meet."""
    size = counts.shape[1]
    places = np.arange(size, dtype=np.float32) + 0.5
    turns = np.exp(2j * np.pi * places / size)
    rough = as_floats(np.angle(counts @ turns) * size / (2 * np.pi))[:, None]
    weights = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return as_floats((rough[:, 0] + (weights * wrapped(places - rough, size)).sum(1)) % size)


def _bridged(values: Floats, size: int | None = None) -> Floats:
    """Values with short gaps filled in a straight line: on its way to its complement a colour passes grey. `size`: of
    an axis whose ends meet."""
    known = ~np.isnan(values)
    if known.mean() < 0.75:
        return values
    frames, there = np.arange(len(values)), values[known]
    if size is None:
        return as_floats(np.interp(frames, frames[known], there))
    return as_floats(np.interp(frames, frames[known], np.unwrap(there, period=size)) % size)


def _shape(mask: Masks, x: float, y: float, area: float) -> str:
    """The shape that overlaps the mask best, where no mark can be."""
    rows, columns = np.mgrid[: mask.shape[0], : mask.shape[1]].astype(np.float32) + 0.5
    dx = wrapped(columns - x, mask.shape[1])

    def overlap(shape: str, with_mark: bool) -> float:
        radius = math.sqrt(area / (_AREAS[shape] - (0.16 * math.pi if with_mark else 0.0)))
        dy = wrapped(rows - y + _CENTROIDS.get(shape, 0.0) * radius, mask.shape[0])
        template = coverage(shape, dx, dy, radius) > 0.5
        outside = dx**2 + dy**2 > (0.5 * radius) ** 2
        both, either = (mask & template & outside).sum(), ((mask | template) & outside).sum()
        return float(both / max(either, 1))

    return max(SHAPES, key=lambda shape: max(overlap(shape, False), overlap(shape, True)))


def _colour(frame: Floats, mask: Masks) -> str:
    mean = frame[mask].mean(0)
    return list(COLOURS)[int(np.linalg.norm(_PALETTE - mean, axis=-1).argmin())]


def mark(video: Floats, seen: Seen, first: int, stop: int) -> str | None:
    """Which mark the thing bears in most of these frames; None where its middle is neither mark nor thing."""
    return most(_mark(video[i], seen, i) for i in range(first, stop))


def _mark(frame: Floats, seen: Seen, index: int) -> str | None:
    x, y, radius = (float(part[index]) for part in (seen.x, seen.y, seen.radius))
    colour = seen.colours[index]
    if colour is None or math.isnan(x):
        return None
    rows, columns = np.mgrid[: frame.shape[0], : frame.shape[1]].astype(np.float32) + 0.5
    off = wrapped(columns - x, frame.shape[1]) ** 2 + wrapped(rows - y, frame.shape[0]) ** 2
    middle = frame[off <= max(MARK_SHARE * radius, 1.5) ** 2].mean(0)
    if middle.max() - middle.min() < SATURATED:
        return "white" if middle.mean() > 0.7 else "black" if middle.mean() < 0.35 else None
    return "none"


def which_background(frames: Floats) -> int | None:
    """The background behind most pixels of the frames' median."""
    still = np.median(frames, axis=0)
    errors = [float(np.median(np.abs(still - background(index)).mean(-1))) for index in range(len(BACKGROUNDS))]
    best = int(np.argmin(errors))
    return best if errors[best] < BACKGROUND_ERROR else None


def drift(video: Floats, first: int, last: int) -> float:
    """PSNR in dB between two frames over what is background in both."""
    still = backdrop(video, first, last)
    return psnr(video[first][still], video[last][still]) if still.mean() > 0.2 else 0.0


def brightness_change(video: Floats, first: int, last: int) -> float:
    """How much brighter (in 0..1, negative: darker) what is background in both frames has become, as a mean."""
    still = backdrop(video, first, last)
    return float((video[last][still] - video[first][still]).mean())


def backdrop(video: Floats, first: int, last: int) -> Masks:
    """Where both frames show background [H, W]: 9 pixels away from things, further than a mark reaches, which is as
    grey as a background."""
    return ~_grown(saturated(video[[first, last]]).any(0), 9)


def _grown(masks: Masks, pixels: int) -> Masks:
    """Masks [..., H, W] wider by so many pixels on all sides; what crosses an edge goes on at the opposite one."""
    for _ in range(pixels):
        wider = masks.copy()
        for axis, step in ((-2, 1), (-2, -1), (-1, 1), (-1, -1)):
            wider |= np.roll(masks, step, axis)
        masks = wider
    return masks


def psnr(a: Floats, b: Floats) -> float:
    """In dB, values in 0..1; at most 60."""
    return -10 * math.log10(max(float(np.square(a - b).mean()), 1e-6))


def seam(video: Floats, borders: Sequence[int]) -> float:
    """Change into the frames `borders` (the first of each block but the first) over change into the others."""
    change = np.abs(np.diff(video, axis=0)).mean((1, 2, 3))
    across = np.zeros(len(change), bool)
    across[[border - 1 for border in borders]] = True
    return float(change[across].mean() / max(float(change[~across].mean()), 1e-5))
