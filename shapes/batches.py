"""What the transformer sees in each step of training, and the recipe that decides it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from shapes.captions import FAIRLY
from shapes.data import BLOCK, Clip, as_video, make_clip, pixel_frame
from shapes.dit import TextEncoder
from shapes.drawing import render
from shapes.drift import drifted
from shapes.following import anywhere, shifted
from shapes.forward import Plan
from shapes.linear import LinearCode

TRAIN_SEED, STEP_SEED = 21, 22
SEEDS = 100  # between those of two runs, see DiTRecipe.seed
PARTS = 2  # of a batch, each with its own random numbers
MOST_DISTILLED = 3  # blocks of a clip
STORIES = 0  # as a number of blocks: videos that go on and on, see shapes.stories
COMMANDS = -1  # as a number of blocks: what is right after a prompt switch
WINDOW = 10  # latent frames that a block of a long video sees, the first one and itself included
PREFIXES = {3: 0.3, 6: 0.25, 9: 0.2, 12: 0.1, WINDOW: 0.15}  # frames before a switch: a video's first, or a window
BLOCKS_AFTER = {1: 0.3, 2: 0.2, 3: 0.5}  # a switch: the later ones have to know that its command has been obeyed
LATEST = 20  # blocks before a switch in a window
# How many times as often motions and verbs come. Two things are the hardest; what goes in a circle is at another place
# within a token in every frame, and melts; that something grows or shrinks while it moves is forgotten.
HARD = {"pass": 2.7, "orbit": 4.0, "grow": 2.5, "shrink": 2.5}


@dataclass(frozen=True)
class Phase:
    """To the share `until` of all steps, batches have as many blocks as their weights say: {blocks: weight}."""

    until: float
    blocks: dict[int, float]


# Blocks of a batch's clips -> clips, noisy copies. A first block has nothing before it and is the hardest: short
# clips show many of them. A block after a switch is the only one in which a command can be learnt: so there too.
BATCHES = {1: (16, 5), 3: (8, 2), 7: (4, 2), COMMANDS: (24, 2), STORIES: (4, 2)}


@dataclass(frozen=True)
class DiTRecipe:
    """What is trained on, from the first block's picture to videos without end.

    All that changes on the way does so at a share of `steps`. To `plain_until` captions leave nothing open but the
    background. `storyboards`: share of batches of more than one block with a prompt switch. From `own_from` on the
    share `own_history` of batches has a history that the model has drawn itself, and the share `own_answers` of those
    whose truth can be known is `answered`, unless drawing has given answers (see Batch). From `distill_from` on clips
    of few blocks are distilled. The share `drifted` of the clips right after a prompt switch comes from a film that has
    drifted, from `own_from` on too; the share `elsewhere` of them is at any other place: first captions leave none
    open, but what follows holds everywhere, and a thing is to be drawn well everywhere. From `hard_from` on what is
    HARD comes more often.
    A run that begins with the weights of a finished model begins at `joined`, where everything is known. Until
    `distill_from` first blocks learn the flow anew: where each of ten runs had the distilled model before it as its
    teacher, they came to show both ways round a circle at once. `seed`: other clips than other runs have; without one
    it would see again what its weights have seen. `wide`: so many times the clips of BATCHES, but for stories; a GPU
    takes little longer. `batch` instead of all these numbers.
    """

    steps: int = 14000
    phases: tuple[Phase, ...] = (
        Phase(0.12, {1: 0.7, 3: 0.3}),
        Phase(0.3, {1: 0.4, 3: 0.3, 7: 0.3}),
        Phase(0.7, {1: 0.1, 3: 0.05, 7: 0.1, COMMANDS: 0.6, STORIES: 0.15}),
        Phase(0.87, {1: 0.15, 3: 0.1, 7: 0.1, COMMANDS: 0.5, STORIES: 0.15}),
        Phase(1.0, {1: 0.1, 3: 0.08, 7: 0.12, COMMANDS: 0.48, STORIES: 0.22}),
    )
    joined: float = 0.75
    plain_until: float = 0.05
    storyboards: float = 0.3
    own_history: float = 0.6
    own_from: float = 0.3
    own_answers: float = 0.75
    drifted: float = 0.5
    elsewhere: float = 0.5
    distill_from: float = 0.87
    hard_from: float = 0.25
    cool_down: float = 0.35
    muon_lr: float = 0.02
    adam_lr: float = 2e-3
    decay: float = 0.997
    seed: int | None = None
    wide: int = 1
    batch: int | None = None
    compile: bool = True

    @property
    def later_seeds(self) -> int:
        """What is added to all seeds."""
        return SEEDS * (self.seed or 0)

    def clips(self, number: int) -> int:
        """Of a batch that has `number` clips in BATCHES."""
        return self.batch or self.wide * number

    def blocks(self, step: int, rng: np.random.Generator) -> int:
        """How many blocks the clips of this step have."""
        weights = next(phase.blocks for phase in self.phases if step < phase.until * self.steps)
        return int(rng.choice(list(weights), p=list(weights.values())))


@dataclass(frozen=True)
class Batch:
    """Clean frames `history` [B, plan.clean or more, 16, h, w], the blocks `target` [B, K, n, 16, h, w] that are to be
    noised `copies` times, and what both see of each other; embedded captions [B, text_len, text_dim].

    `seed` decides its noise, `share` is its part of the step's clips. `first_block`: whether the first block counts;
    once it is distilled, flow matching would only pull it back. `early`: the first copy is always at the noise levels
    of the first two sampling steps, where a command is obeyed or not. `redraw`: the history is to be the model's own
    drawing; after a prompt switch it is drawn block by block, which gives `answers`. `answered`: the last copy is the
    model's own answer after one to three sampling steps, noised again for the next one, where the truth is still the
    goal. Over noised truth alone a later step learns to believe what it sees, and finishes what the first one got
    wrong. So it is never in a first block whose background is the video's own choice: there the mean of all backgrounds
    would be learnt. `answers` [3, B, K, n, 16, h, w] are used instead, if there are any: what the first three steps
    have made of the blocks when they were drawn one after the other.
    """

    history: Tensor
    target: Tensor
    embeds: Tensor
    plan: Plan
    copies: int
    seed: int
    share: float
    redraw: bool = False
    distilled: bool = False
    first_block: bool = True
    early: bool = False
    answered: bool = False
    answers: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


class Batches(Dataset[list[Batch]]):
    """Item `step` is what process `rank` of `workers` computes in that step: its parts of the batch; none in a step
    of stories, which are not made ahead of time."""

    def __init__(self, recipe: DiTRecipe, code: LinearCode, text: TextEncoder, rank: int = 0, workers: int = 1) -> None:
        self._recipe, self._code, self._text = recipe, code, text
        self._clip_seed, self._step_seed = TRAIN_SEED + recipe.later_seeds, STEP_SEED + recipe.later_seeds
        self._parts = range(rank, PARTS, workers)

    def __getitem__(self, step: int) -> list[Batch]:
        recipe = self._recipe
        rng = np.random.default_rng((self._step_seed, step))
        blocks = recipe.blocks(step, rng)
        if blocks == STORIES:
            return []
        if blocks == COMMANDS:
            return self._commands(step, rng)
        size, copies = BATCHES[blocks]
        size = recipe.clips(size)
        assert size >= PARTS
        storyboard = blocks > 1 and rng.random() < recipe.storyboards
        switch = int(rng.integers(min(2, blocks - 1), min(5, blocks))) if storyboard else 0
        own = self._own(step, recipe.own_history, rng) and blocks - switch > 1
        distilling = step >= recipe.distill_from * recipe.steps
        distilled = distilling and blocks <= MOST_DISTILLED and not switch
        first_block = not distilling or bool(switch)
        known = bool(switch) or not first_block
        answered = self._own(step, recipe.own_answers, rng) and known and not distilled
        seed = int(rng.integers(1 << 40))
        plain = step < recipe.plain_until * recipe.steps
        favoured = HARD if step >= recipe.hard_from * recipe.steps else FAIRLY
        frames = pixel_frame(blocks * BLOCK)
        switches, plan = (BLOCK * switch,) if switch else (), Plan(blocks - switch, prefix=BLOCK * switch)
        batches = []
        for part, numbers in self._numbers(step, size).items():
            clips = [make_clip(self._clip_seed, i, switches, frames, plain=plain, favoured=favoured) for i in numbers]
            latents = self._code.encode(torch.stack([as_video(clip.video) for clip in clips]))
            batch = self._batch(clips, latents, plan, copies, seed + part, size)
            batches.append(replace(batch, redraw=own, distilled=distilled, first_block=first_block, answered=answered))
        return batches

    def _commands(self, step: int, rng: np.random.Generator) -> list[Batch]:
        """Clips of a few blocks after a prompt switch, and of the frames before it that are encoded in one pass then;
        some have had another command before."""
        recipe, copies = self._recipe, BATCHES[COMMANDS][1]
        blocks = int(rng.choice(list(BLOCKS_AFTER), p=list(BLOCKS_AFTER.values())))
        size = recipe.clips(BATCHES[COMMANDS][0] // blocks)
        prefix = int(rng.choice(list(PREFIXES), p=list(PREFIXES.values())))
        plan = Plan(blocks, prefix, window=WINDOW if prefix == WINDOW else None)
        own = self._own(step, recipe.own_history, rng) and blocks > 1
        answered = self._own(step, recipe.own_answers, rng)
        seed = int(rng.integers(1 << 40))
        batches = []
        for part, numbers in self._numbers(step, size).items():
            clips, videos, pasts, own_rng = [], [], [], np.random.default_rng((self._step_seed, step, part))
            for i in numbers:
                switch = BLOCK * int(own_rng.integers(WINDOW // BLOCK + 1, LATEST)) if prefix == WINDOW else prefix
                earlier = BLOCK * int(own_rng.integers(1, max(2, switch // BLOCK)))
                switches = (earlier, switch) if earlier < switch and own_rng.random() < 0.5 else (switch,)
                start, stop = (pixel_frame(at) for at in (switch - prefix, switch + BLOCK * blocks))
                clip = make_clip(self._clip_seed, i, switches, stop, favoured=HARD)
                clips.append(clip)
                film = clip.film.cut(start, stop)
                if own_rng.random() < recipe.elsewhere:
                    film = shifted(film, [anywhere(own_rng)] * len(film.tracks))
                videos.append(as_video(render(film)))
                drift = self._own(step, recipe.drifted, own_rng)
                past = drifted(film, pixel_frame(switch) - start, own_rng) if drift else None
                pasts.append(as_video(render(past)) if past else videos[-1])
            encode = self._code.encode_later if prefix == WINDOW else self._code.encode
            latents, history = (encode(torch.stack(some)) for some in (videos, pasts))
            batch = self._batch(clips, latents, plan, copies, seed + part, size)
            batches.append(replace(batch, history=history, redraw=own, early=True, answered=answered))
        return batches

    @torch.no_grad()
    def _batch(self, clips: Sequence[Clip], latents: Tensor, plan: Plan, copies: int, seed: int, size: int) -> Batch:
        """Of clips under their last captions, a part of a step's `size`; latents of the plan's frames [B, F, ...]."""
        embeds = self._text([clip.captions[-1] for clip in clips])
        target = latents[:, plan.prefix :].unflatten(1, (-1, BLOCK))
        return Batch(latents, target, embeds, plan, copies, seed, len(clips) / size)

    def _own(self, step: int, share: float, rng: np.random.Generator) -> bool:
        """Whether a batch has something that the model has made itself, or a clip a past that has drifted as what it
        makes does, as a share of them has from `own_from` on."""
        return bool(step >= self._recipe.own_from * self._recipe.steps and rng.random() < share)

    def _numbers(self, step: int, size: int) -> dict[int, range]:
        """The clips of this process's parts of a step; no clip is seen twice."""
        most = max(clips for clips, _ in BATCHES.values())
        first, cuts = step * self._recipe.clips(most), parts_of(size)
        return {part: range(first + cuts[part][0], first + cuts[part][1]) for part in self._parts}


def parts_of(size: int) -> list[tuple[int, int]]:
    """Where the parts of a batch of `size` clips begin and end."""
    return list(itertools.pairwise(np.linspace(0, size, PARTS + 1).astype(int).tolist()))
