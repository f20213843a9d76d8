"""Videos without end for training: the model's own history over many blocks, with prompt switches on the way.

Teacher forcing shows true histories alone, and those of one clip's length. Here a few stories are always under way.
In every turn one of them goes on by some blocks that the model itself draws, in the product's four steps, through the
product's cache (a window, relative positions, at a switch the last frames re-encoded in one pass); then the model
learns what these blocks should have been, given the history that it has made and, in one noisy copy, over what a
sampling step has made of them (`shapes.rollout`). So errors that grow over minutes are met while they are small. The
truth of the next turn goes on from where the drawn things are (`shapes.following`). Where they are lost even so, the
story is put right; how old stories become before is a measure of what has been learnt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from shapes.batches import BATCHES, HARD, STORIES, WINDOW, Batch, parts_of
from shapes.data import BLOCK, Clip, as_video, make_clip, pixel_frame
from shapes.dit import TextEncoder
from shapes.drawing import render
from shapes.film import Film
from shapes.following import Shift, added, anywhere, moved, shifted
from shapes.forward import Plan
from shapes.linear import LinearCode
from shapes.rollout import LOST, draw_against
from shapes.schedule import wide
from wan.transformer.model import CausalWanModel

STORY_SEED = 23
TURN = 3  # blocks by which a story goes on at a time, and that stand before them
GROUPS = 8  # stories under way in each part; those of a group have their switches at the same frames
SCENES = (1, 2, 3)  # turns between switches
LENGTHS = (5, 10, 27)  # turns of a story; 27 are 60 s
QUIET = 0.25  # share of groups without any switch
ELSEWHERE = 0.5  # share of stories whose things are at another place than their first captions say, see `anywhere`
OWN = 0.75  # share of turns in which the model draws; in the others the history is the truth


@dataclass
class Group:
    """Stories side by side: `count` clips from number `first` on, of `length` latent frames, with their switches at
    the same ones. They go on with latent frame `at`, in turn number `turns` since the beginning or the last switch.

    `prefix` [B, m, 16, h, w] are the frames that were encoded in one pass then, `recent` the last frames. `age` counts
    turns since a story was last put right. `shifts`: where the things of each are, as its film has them.
    """

    first: int
    count: int
    length: int
    switches: tuple[int, ...]
    at: int
    turns: int
    prefix: Tensor
    recent: Tensor
    age: list[int]
    seed: int = STORY_SEED
    shifts: list[list[Shift]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.shifts = self.shifts or [[(0.0, 0.0)] * len(clip.film.tracks) for clip in self.clips]

    @cached_property
    def clips(self) -> list[Clip]:
        frames = pixel_frame(self.length)
        numbers = range(self.first, self.first + self.count)
        return [make_clip(self.seed, i, self.switches, frames, favoured=HARD) for i in numbers]

    def films(self, start: int, stop: int) -> list[Film]:
        """These latent frames of the clips, from where their things are now."""
        films = [clip.film.cut(pixel_frame(start), pixel_frame(stop)) for clip in self.clips]
        return [shifted(film, shifts) for film, shifts in zip(films, self.shifts, strict=True)]

    @property
    def scene(self) -> int:
        """The place of the caption that is in force when the story goes on."""
        return sum(switch <= self.at for switch in self.switches)

    def state(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


class Stories:
    """The stories of one of the parts of a batch."""

    def __init__(
        self, code: LinearCode, text: TextEncoder, part: int, batch: int | None = None, later_seeds: int = 0
    ) -> None:
        size, self._copies = BATCHES[STORIES]
        size = batch or size
        first, stop = parts_of(size)[part]
        self._count, self._share, self._part = stop - first, (stop - first) / size, part
        self._code, self._text, self._seed = code, text, STORY_SEED + later_seeds
        self._groups: dict[int, Group] = {}
        self.ages: list[int] = []  # turns that stories have lasted until they were put right or ended

    def next(self, model: CausalWanModel, step: int) -> Batch:
        """The turn of step number `step`, of the group whose turn it is."""
        rng = np.random.default_rng((self._seed, self._part, step))
        place = int(rng.integers(GROUPS))
        group = self._groups.get(place)
        if group is None or group.at >= group.length:
            if group is not None:
                self.ages += group.age
            # At first they are of all ages, as they will be later.
            group = self._groups[place] = self._begin(rng, step, fresh=group is not None)
        return self._turn(group, model, rng)

    def state(self) -> list[dict[str, object]]:
        return [{"place": place, **group.state()} for place, group in self._groups.items()]

    def restore(self, groups: list[dict[str, object]]) -> None:
        for values in groups:
            fields = {name: value for name, value in values.items() if name != "place"}
            self._groups[cast(int, values["place"])] = Group(**cast("Mapping[str, Any]", fields))

    def _begin(self, rng: np.random.Generator, step: int, fresh: bool) -> Group:
        """A group that begins, or one that true frames have brought somewhere."""
        turns = int(rng.choice(LENGTHS))
        length, switches, at = BLOCK * (1 + TURN * turns), [], BLOCK
        while rng.random() >= QUIET if not switches else at < length:
            at += BLOCK * TURN * int(rng.choice(SCENES))
            switches.append(at)
        switches = [switch for switch in switches if switch < length]
        skipped = 0 if fresh else int(rng.integers(turns))
        at = BLOCK + BLOCK * TURN * skipped
        last = max((switch for switch in switches if switch < at), default=None)
        first = self._count * (2 * step + self._part)
        none = torch.empty(0)
        group = Group(first, self._count, length, tuple(switches), at, 0, none, none, [], self._seed)
        group.shifts = [[self._place(rng)] * len(clip.film.tracks) for clip in group.clips]
        group.turns = (at - (BLOCK if last is None else last)) // (BLOCK * TURN)
        group.prefix = self._truth(group, 0, BLOCK) if last is None else self._truth(group, last - WINDOW, last)
        group.recent = self._truth(group, max(0, at - WINDOW), at)
        group.age = [0] * self._count
        return group

    def _place(self, rng: np.random.Generator) -> Shift:
        return anywhere(rng) if rng.random() < ELSEWHERE else (0.0, 0.0)

    def _truth(self, group: Group, start: int, stop: int) -> Tensor:
        """Latent frames [B, stop - start, 16, h, w] of the films."""
        videos = torch.stack([as_video(render(film)) for film in group.films(start, stop)])
        return self._code.encode(videos) if start == 0 else self._code.encode_later(videos)

    @torch.no_grad()
    def _turn(self, group: Group, model: CausalWanModel, rng: np.random.Generator) -> Batch:
        start, stop = group.at, group.at + BLOCK * TURN
        if start in group.switches:
            group.prefix, group.turns = group.recent[:, -WINDOW:], 0
        embeds = self._text([clip.captions[group.scene] for clip in group.clips])
        plan = Plan(TURN, prefix=group.prefix.shape[1], window=WINDOW)
        if group.turns:
            plan = Plan(2 * TURN, prefix=plan.prefix, quiet=TURN, window=WINDOW, gap=True)
        past = torch.cat(
            (group.prefix, group.recent[:, -BLOCK * plan.quiet :] if plan.quiet else group.prefix[:, :0]), 1
        )
        truth = self._truth(group, start, stop)
        target = truth.unflatten(1, (-1, BLOCK))
        blocks = seen = truth
        answers, seed = None, int(rng.integers(1 << 40))
        if rng.random() < OWN:
            here, words, there = (part.to(model.device) for part in (past, embeds, target))
            noise = torch.Generator().manual_seed(int(rng.integers(1 << 40)))  # not the loss's
            drawn = draw_against(model, here, words, plan, there, noise)
            blocks, answers = drawn.history.cpu(), drawn.answers.cpu()
            seen = self._follow(group, drawn.blocks.cpu(), truth)
        group.recent = torch.cat((group.recent, seen), dim=1)[:, -max(WINDOW, BLOCK * TURN) :]
        group.at, group.turns = stop, group.turns + 1
        history = torch.cat((past, blocks), dim=1)
        return Batch(history, target, embeds, plan, self._copies, seed, self._share, answers=answers)

    def _follow(self, group: Group, blocks: Tensor, truth: Tensor) -> Tensor:
        """What a turn's drawn blocks are for the next one [B, F, 16, h, w]: the truth where a story is lost, else
        themselves, and its things are where they have been drawn."""
        stop = group.at + blocks.shape[1]
        end, before = blocks[:, -BLOCK:], group.shifts
        videos = self._code.decode(end)[:, 1:].clamp(-1, 1).permute(0, 1, 3, 4, 2).numpy() / 2 + 0.5
        moves = [moved(film, video) for film, video in zip(group.films(stop - BLOCK, stop), videos, strict=True)]
        group.shifts = [added(old, move) if move else old for old, move in zip(before, moves, strict=True)]
        off = (end - self._truth(group, stop - BLOCK, stop)).square().flatten(1).mean(1)
        lost = torch.tensor([move is None for move in moves]) | (off > LOST)
        group.shifts = [old if late else new for old, new, late in zip(before, group.shifts, lost, strict=True)]
        self._grow_older(group, lost.tolist())
        return torch.where(wide(lost), truth, blocks)

    def _grow_older(self, group: Group, lost: Sequence[bool]) -> None:
        """After a turn; a story that is lost is put right."""
        for i, late in enumerate(lost):
            if late:
                self.ages.append(group.age[i])
            group.age[i] = 0 if late else group.age[i] + 1
