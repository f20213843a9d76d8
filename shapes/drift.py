"""Films that go wrong as a model's own videos do: bit by bit a thing or a background comes to look like another one.

Such a film stands for the past, and the true one for what is to come: so it is learnt to follow the caption, and the
shape that can still be told, not the last frames' error.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from shapes.film import Film
from shapes.world import BACKGROUNDS, SHAPES, Floats, Track, as_floats

MELTED = 0.45  # of the way to another shape, at most: which of the two it was can still be seen
SWOLLEN = 0.08  # of its radius, at most: less than half a step between sizes
TINTED = 0.25  # of the way to another background, at most
TO_DISC = 0.7  # share of things that become rounder, which models do most; discs and the others may go anywhere


def drifted(film: Film, frames: int, rng: np.random.Generator) -> Film:
    """The film with things and a background that drift over its first `frames` pixel frames, having begun before, and
    stay like that. What is on its way from one shape to another stays as it is."""
    begun = rng.uniform(0, 1)
    ramp = as_floats(begun + (1 - begun) * np.clip(np.arange(len(film)) / frames, 0, 1))
    tint = rng.uniform(0, TINTED) * ramp[:, None]
    other = np.eye(len(BACKGROUNDS))[rng.integers(len(BACKGROUNDS))]
    return replace(
        film,
        tracks=tuple(_drifted(track, ramp, rng) for track in film.tracks),
        backdrop=as_floats((1 - tint) * film.backdrop + tint * other),
    )


def _drifted(track: Track, ramp: Floats, rng: np.random.Generator) -> Track:
    melted, swollen = rng.uniform(0, MELTED), rng.uniform(-SWOLLEN, SWOLLEN)
    disc, own = SHAPES.index("disc"), int(track.after[-1])
    other = disc if own != disc and rng.random() < TO_DISC else int(rng.integers(len(SHAPES)))
    settled = (track.before == track.after) | (track.morph >= 1)
    return replace(
        track,
        radius=as_floats(track.radius * (1 + swollen * ramp)),
        before=np.where(settled, track.after, track.before),
        after=np.where(settled, other, track.after),
        morph=as_floats(np.where(settled, melted * ramp, track.morph)),
    )
