"""Training clips, made when they are asked for: clip number i of a seed is always the same.

A `Clip` is a video with its captions; nothing here knows latents or models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shapes.captions import PASSING_WEIGHT, caption, later_scene, random_hidden, random_scene
from shapes.world import FRAMES, Floats, Hidden, Scene, render, story, tracks

BLOCK = 3  # latent frames
_SCENES, _WORDING = 0, 1  # streams of random numbers


@dataclass(frozen=True)
class Clip:
    """scenes[i] begins with latent frame starts[i] and has captions[i]; `video` [frames, H, W, 3] in 0..1."""

    scenes: tuple[Scene, ...]
    starts: tuple[int, ...]
    captions: tuple[str, ...]
    hidden: Hidden
    video: Floats


def pixel_frame(latent_frame: int) -> int:
    """The first pixel frame of a latent frame."""
    return max(0, 4 * latent_frame - 3)


def make_clip(
    seed: int,
    index: int,
    switch: int | None = None,
    frames: int = FRAMES,
    held: bool | None = False,
    plain: bool = False,
    passing_weight: float = PASSING_WEIGHT,
) -> Clip:
    """Clip `index`; with `switch` a second caption takes over at that latent frame. `held` and
    `passing_weight`: see `random_scene`.

    In a plain clip nothing but the background is left open by the caption.
    """
    rng = np.random.default_rng((seed, index, _SCENES))
    words = np.random.default_rng((seed, index, _WORDING))
    scene, hidden = random_scene(rng, held, passing_weight), random_hidden(rng)
    if plain:
        hidden = Hidden(background=hidden.background)
    if switch is None:
        return Clip((scene,), (0,), (caption(scene, words),), hidden, render(tracks(scene, hidden, frames), hidden))
    while scene.motion in ("pass", "turn"):  # one thing, of a colour that has a name
        scene = random_scene(rng, held)
    later = later_scene(rng, scene)
    things = story(((0, scene), (pixel_frame(switch), later)), hidden, frames)
    texts = caption(scene, words), caption(later, words, later=True)
    return Clip((scene, later), (0, switch), texts, hidden, render(things, hidden))


def as_video(frames: Floats) -> Tensor:
    """[frames, H, W, 3] in 0..1 to [frames, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2) * 2 - 1
