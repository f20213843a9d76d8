"""The atlas as data: attention of every head to every frame, for each block, pass and video; one safetensors file.

Axes: V videos, P passes of a block, layers, heads. Whatever follows from these numbers (ranks, roles, how stable the
dummy set is) is worked out here and in stability.py; nothing here knows a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dummy.atlas.stored import FILE, read_atlas
from dummy.config import DummyForcingConfig
from dummy.frame_attention import regions
from dummy.policies.registry import split_of
from dummy.policy import HeadSplit
from dummy.roles import HeadRoles, Role, dummy_ranks

CLEAN = "clean"  # the name of the clean pass; the others are numbers of denoising steps, from 0 on


@dataclass(frozen=True)
class Atlas:
    """`attention[block]` [V, P, layers, heads, context frames + 1]: to each earlier frame that the block saw, oldest
    first, and to the block itself; `entropy[block]` [V, P, layers, heads] in nats; `frames[block]`: the numbers of the
    earlier frames. `forcing` and `block_frames` say how roles are found; `about` is whatever else is worth knowing.
    """

    attention: Mapping[int, Tensor]
    entropy: Mapping[int, Tensor]
    frames: Mapping[int, tuple[int, ...]]
    passes: tuple[str, ...]
    videos: tuple[str, ...]  # prompts
    forcing: DummyForcingConfig
    block_frames: int
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def blocks(self) -> list[int]:
        return sorted(self.attention)

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and heads."""
        layers, heads = next(iter(self.entropy.values())).shape[2:]
        return layers, heads

    @property
    def split(self) -> HeadSplit:
        """How roles follow from attention."""
        return split_of(self.forcing, self.block_frames)

    def by_prompt(self) -> dict[str, list[int]]:
        """Every prompt, once, with the numbers of its videos."""
        found: dict[str, list[int]] = {}
        for number, prompt in enumerate(self.videos):
            found.setdefault(prompt, []).append(number)
        return found

    def regions(self, block: int) -> Tensor:
        """[V, P, layers, heads, 3]: attention to sink, neighbour and current frames."""
        return regions(self.attention[block], self.forcing.sink_score_frames)

    def mean_regions(self) -> Tensor:
        """[layers, heads, 3]: the mean over everything that was recorded."""
        return torch.cat([self.regions(block).flatten(0, 1) for block in self.blocks]).mean(0)

    def roles(self, block: int, video: int, place: int) -> HeadRoles:
        """The roles that one pass alone gives."""
        return self.split.find_roles(self.attention[block][video, place])[0]

    def dummy_sets(self, block: int) -> Tensor:
        """[V, P, layers, heads] of bool: which heads each pass would make dummy."""
        videos, passes = self.attention[block].shape[:2]
        rows = [[self.roles(block, video, place).codes() for place in range(passes)] for video in range(videos)]
        return torch.tensor(rows) == int(Role.DUMMY)

    def save(self, path: Path) -> None:
        """Write the file; with the ranks, which follow from the rest. Raises InputError if it cannot be written."""
        tensors = {}
        for block in self.blocks:
            shares = self.regions(block)
            ranks = torch.stack([dummy_ranks(one) for one in shares.flatten(0, 1)]).view(shares.shape[:-1])
            tensors[f"attention.{block}"] = self.attention[block].contiguous()
            tensors[f"entropy.{block}"] = self.entropy[block].contiguous()
            tensors[f"dummy_rank.{block}"] = ranks.int()
        content = {
            "frames": {str(block): list(self.frames[block]) for block in self.blocks},
            "passes": list(self.passes),
            "videos": list(self.videos),
            **self.about,
        }
        FILE.save(path, content, tensors)

    @classmethod
    def load(cls, path: Path, forcing: DummyForcingConfig, block_frames: int) -> Atlas:
        """Read the file; roles are to be found as `forcing` says. Raises InputError if it is broken, or if its model
        has too few heads for that."""
        about, tensors = read_atlas(path, block_frames)
        frames = {int(block): tuple(numbers) for block, numbers in about.pop("frames").items()}
        atlas = cls(
            {block: tensors[f"attention.{block}"] for block in frames},
            {block: tensors[f"entropy.{block}"] for block in frames},
            frames,
            tuple(about.pop("passes")),
            tuple(about.pop("videos")),
            forcing,
            block_frames,
            about,
        )
        forcing.budget.check(*atlas.shape)
        return atlas
