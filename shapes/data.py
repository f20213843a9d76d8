"""Training clips, made when they are asked for: clip number i of a seed is always the same.

A `Clip` is a film with its captions; nothing here knows latents or models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from shapes.captions import FAIRLY, caption, random_hidden, random_scene
from shapes.commands import random_command, sentence
from shapes.drawing import render
from shapes.film import Film, film
from shapes.world import FRAMES, Command, Floats, Hidden, Scene, begin

BLOCK = 3  # latent frames
_SCENES, _WORDING = 0, 1  # streams of random numbers


@dataclass(frozen=True)
class Clip:
    """A scene and its commands, of which commands[i] takes effect with latent frame switches[i]; captions[0] is the
    scene's, captions[1 + i] the command's."""

    scene: Scene
    hidden: Hidden
    captions: tuple[str, ...]
    switches: tuple[int, ...] = ()
    commands: tuple[Command, ...] = ()
    frames: int = FRAMES

    @property
    def starts(self) -> tuple[int, ...]:
        """The latent frame with which each caption takes effect."""
        return (0, *self.switches)

    @property
    def script(self) -> list[tuple[int, Command]]:
        """Commands with their pixel frames."""
        return [(pixel_frame(start), command) for start, command in zip(self.switches, self.commands, strict=True)]

    @cached_property
    def film(self) -> Film:
        return film(self.scene, self.hidden, self.frames, self.script)

    @cached_property
    def video(self) -> Floats:
        """[frames, H, W, 3] in 0..1"""
        return render(self.film)


def pixel_frame(latent_frame: int) -> int:
    """The first pixel frame of a latent frame."""
    return max(0, 4 * latent_frame - 3)


def make_clip(
    seed: int,
    index: int,
    switches: Sequence[int] = (),
    frames: int = FRAMES,
    held: bool | None = False,
    plain: bool = False,
    favoured: Mapping[str, float] = FAIRLY,
) -> Clip:
    """Clip `index`; at the latent frames `switches` further captions take over. `held` and `favoured`: see
    `random_scene`; what is held out of commands is so too.

    In a plain clip nothing but the background is left open by the caption.
    """
    rng = np.random.default_rng((seed, index, _SCENES))
    words = np.random.default_rng((seed, index, _WORDING))
    scene, hidden = random_scene(rng, held, favoured), random_hidden(rng)
    if plain:
        hidden = Hidden(background=hidden.background)
    texts, commands = [caption(scene, words)], []
    world, now = begin(scene, hidden), 0
    for switch in switches:
        world, now = world.later(pixel_frame(switch) - now), pixel_frame(switch)
        command = random_command(rng, world, held, favoured)
        texts.append(sentence(command, world, words))
        commands.append(command)
        world = world.obey(command)
    return Clip(scene, hidden, tuple(texts), tuple(switches), tuple(commands), frames)


def as_video(frames: Floats) -> Tensor:
    """[frames, H, W, 3] in 0..1 to [frames, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2) * 2 - 1
