"""How much the dummy set changes from block to block, step to step, prompt to prompt and seed to seed, what all agree
on, and what the roles of one pass cost in later blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from dummy.atlas.table import CLEAN, Atlas
from dummy.roles import HeadRoles, Role
from utils.errors import InputError

AXES = ("blocks", "steps", "prompts", "seeds")
PAPER = {"blocks": 0.92, "steps": 0.85, "prompts": 0.76}  # arXiv 2601.20499


@dataclass(frozen=True)
class Overlap:
    """`matrix` [n, n]: the overlap of the dummy sets of two entries (of these names), the other axes averaged."""

    names: tuple[str, ...]
    matrix: Tensor

    @property
    def mean(self) -> float | None:
        """Over pairs of different entries; None if there is but one."""
        count = len(self.names)
        if count < 2:
            return None
        return float((self.matrix.sum() - self.matrix.trace()) / (count * (count - 1)))


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """Of sets [..., heads] of bool: twice the common heads over the heads of both, 1 for two empty sets."""
    size = (one.sum(-1) + other.sum(-1)).double()
    return torch.where(size > 0, 2 * (one & other).sum(-1) / size.clamp_min(1), 1.0)


def stability(atlas: Atlas) -> dict[str, Overlap]:
    """The overlap across blocks, denoising steps (the clean pass is none), different prompts, and, where a prompt has
    several videos, these, by the order of their seeds; two random sets of half of the heads overlap by half."""
    sets = torch.stack([atlas.dummy_sets(block).flatten(2) for block in atlas.blocks])  # [blocks, V, P, heads]
    steps = [place for place, name in enumerate(atlas.passes) if name != CLEAN]
    pairs = _along(sets, 1)
    result = {
        "blocks": Overlap(tuple(str(block) for block in atlas.blocks), _along(sets, 0)),
        "prompts": _between_prompts(pairs, atlas.by_prompt()),
    }
    if steps:
        result["steps"] = Overlap(tuple(atlas.passes[place] for place in steps), _along(sets[:, :, steps], 2))
    if len(atlas.by_prompt()) < len(atlas.videos):
        result["seeds"] = _between_seeds(pairs, atlas.by_prompt())
    return {name: result[name] for name in AXES if name in result}


def _along(sets: Tensor, axis: int) -> Tensor:
    entries = sets.movedim(axis, 0).flatten(1, 2)  # [n, others, heads]
    return torch.stack([overlap(entry, entries).mean(-1) for entry in entries])


def _between_prompts(pairs: Tensor, videos: Mapping[str, list[int]]) -> Overlap:
    """`pairs` [V, V] as means over all pairs of videos of two prompts."""
    groups = list(videos.values())
    matrix = torch.tensor([[float(pairs[one][:, other].mean()) for other in groups] for one in groups])
    names = tuple(str(number) for number in range(1, len(groups) + 1))
    return Overlap(names, matrix.fill_diagonal_(1.0))  # a prompt with itself; what its seeds do is another figure


def _between_seeds(pairs: Tensor, videos: Mapping[str, list[int]]) -> Overlap:
    """`pairs` [V, V] as means over the prompts that have both videos."""
    places = range(max(map(len, videos.values())))
    rows = [
        [fmean(float(pairs[group[a], group[b]]) for group in videos.values() if max(a, b) < len(group)) for b in places]
        for a in places
    ]
    return Overlap(tuple(str(place + 1) for place in places), torch.tensor(rows))


@dataclass(frozen=True)
class Consensus:
    """Roles from the attention of several videos, and for every head the share of videos that alone give it the same
    role, [layers, heads]."""

    roles: HeadRoles
    confidence: Tensor
    videos: int

    def to_json(self, about: Mapping[str, object]) -> dict[str, object]:
        """A roles file's content."""
        return {
            **self.roles.to_json(),
            "confidence": [[round(float(value), 4) for value in row] for row in self.confidence],
            "agreement": round(float(self.confidence.mean()), 4),
            "videos": self.videos,
            **about,
        }


def require_role_pass(blocks: Sequence[int], passes: Sequence[str], ar_start: int) -> None:
    """Raises InputError if the pass in which roles are found is none of those that are recorded."""
    if ar_start not in blocks or CLEAN not in passes:
        raise InputError(
            f"--roles: roles are found in the clean pass of block {ar_start} (dummy_forcing.ar_start), but the atlas "
            f"has blocks {list(blocks)} and passes {list(passes)}; record it with --blocks {ar_start} --steps {CLEAN}"
        )


def has_role_pass(atlas: Atlas) -> bool:
    """Whether the pass in which a run finds the roles was recorded."""
    return atlas.forcing.ar_start in atlas.blocks and CLEAN in atlas.passes


def roles_of_videos(atlas: Atlas) -> list[HeadRoles]:
    """What each video alone gives, from the same pass as in a run. Raises InputError if that was not recorded."""
    require_role_pass(atlas.blocks, atlas.passes, atlas.forcing.ar_start)
    place = atlas.passes.index(CLEAN)
    return [atlas.roles(atlas.forcing.ar_start, video, place) for video in range(len(atlas.videos))]


def consensus(atlas: Atlas) -> Consensus:
    """Roles by the same rule and from the same pass as in a run, from the mean attention of all videos.

    Raises InputError if that pass was not recorded.
    """
    single = torch.tensor([roles.codes() for roles in roles_of_videos(atlas)])
    attention = atlas.attention[atlas.forcing.ar_start][:, atlas.passes.index(CLEAN)]
    roles, _ = atlas.split.find_roles(attention.mean(0))
    return Consensus(roles, (single == torch.tensor(roles.codes())).double().mean(0), len(atlas.videos))


def lost_attention(atlas: Atlas) -> dict[int, float]:
    """For each block the share of all heads' attention, in the clean pass, that goes to frames which each video's dummy
    heads do not keep; the mean over videos. Raises InputError as `roles_of_videos`."""
    codes = torch.tensor([roles.codes() for roles in roles_of_videos(atlas)])  # [V, layers, heads]
    dummy, place = codes == int(Role.DUMMY), atlas.passes.index(CLEAN)
    losses = {block: atlas.split.lost_by_dummy(atlas.attention[block][:, place]) for block in atlas.blocks}
    return {block: float((lost * dummy).double().mean()) for block, lost in losses.items()}
