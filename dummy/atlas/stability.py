"""How much the dummy set changes from block to block, step to step and prompt to prompt, and what all agree on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dummy.atlas.table import CLEAN, Atlas
from dummy.roles import HeadRoles
from utils.errors import InputError

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
    """The overlap across blocks, denoising steps (the clean pass is none) and prompts; two random sets of half of the
    heads overlap by half."""
    sets = torch.stack([atlas.dummy_sets(block).flatten(2) for block in atlas.blocks])  # [blocks, V, P, heads]
    steps = [place for place, name in enumerate(atlas.passes) if name != CLEAN]
    result = {
        "blocks": _along(sets, 0, tuple(str(block) for block in atlas.blocks)),
        "prompts": _along(sets, 1, tuple(str(number) for number in range(1, len(atlas.videos) + 1))),
    }
    if steps:
        result["steps"] = _along(sets[:, :, steps], 2, tuple(atlas.passes[place] for place in steps))
    return {name: result[name] for name in PAPER if name in result}


def _along(sets: Tensor, axis: int, names: tuple[str, ...]) -> Overlap:
    entries = sets.movedim(axis, 0).flatten(1, 2)  # [n, others, heads]
    rows = [overlap(entry, entries).mean(-1) for entry in entries]
    return Overlap(names, torch.stack(rows))


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


def consensus(atlas: Atlas) -> Consensus:
    """Roles by the same rule and from the same pass as in a run, from the mean attention of all videos.

    Raises InputError if that pass was not recorded.
    """
    block = atlas.forcing.ar_start
    if block not in atlas.blocks or CLEAN not in atlas.passes:
        raise InputError(
            f"--roles: roles are found in the clean pass of block {block} (dummy_forcing.ar_start), but the atlas has "
            f"blocks {atlas.blocks} and passes {list(atlas.passes)}; record it with --blocks {block} --steps {CLEAN}"
        )
    place = atlas.passes.index(CLEAN)
    roles, _ = atlas.split.find_roles(atlas.attention[block][:, place].mean(0))
    single = torch.tensor([atlas.roles(block, video, place).codes() for video in range(len(atlas.videos))])
    return Consensus(roles, (single == torch.tensor(roles.codes())).double().mean(0), len(atlas.videos))
