"""How many of a block's queries have to be scored: sampled scores and the roles from them against those of all queries.

Every share watches the same passes, those in which a run finds its roles.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from dummy.atlas.recorder import PassRecorder
from dummy.atlas.stability import overlap
from dummy.frame_attention import sampled
from dummy.policies.registry import split_of
from dummy.policy import HeadSplit
from dummy.roles import HeadRoles, Role
from pipeline.atlas.recording import (
    ChosenPasses,
    choose_passes,
    role_settings,
    watch,
    watched_generator,
    watched_policy,
)
from pipeline.config.config import InferenceConfig, geometry_of
from pipeline.config.jobs import VideoJob
from wan.geometry import LatentGeometry

SHARES = (1.0, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01)


@dataclass(frozen=True)
class Row:
    """Of one share, over all videos: the error of a head's share of attention (sink, neighbour, current; 0 to 1), the
    overlap of the dummy set with that from all queries, and heads whose role is another; seconds of scoring."""

    share: float
    queries: int
    mean_error: float
    largest_error: float
    dummy_overlap: float
    least_overlap: float
    other_roles: float  # a video
    seconds: float  # a video


@dataclass(frozen=True)
class SamplingTable:
    rows: tuple[Row, ...]
    videos: int
    heads: int
    num_dummy: int  # of the last video

    def text(self) -> str:
        """Markdown."""
        lines = [
            "| queries | share | mean error | largest error | dummy overlap (least) | other roles | s a video |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            lines.append(
                f"| {row.queries} | {100 * row.share:g} % | {row.mean_error:.5f} | {row.largest_error:.4f} | "
                f"{row.dummy_overlap:.3f} ({row.least_overlap:.3f}) | {row.other_roles:.1f} of {self.heads} | "
                f"{row.seconds:.3f} |"
            )
        return "\n".join(lines) + f"\n{self.videos} videos; {self.num_dummy} dummy heads.\n"

    def as_dict(self) -> dict[str, object]:
        rows = [vars(row) for row in self.rows]
        return {"videos": self.videos, "heads": self.heads, "num_dummy": self.num_dummy, "rows": rows}


class _Sampled:
    """One recorder, and the seconds that it took."""

    def __init__(self, share: float, block: int, chosen: ChosenPasses, geometry: LatentGeometry) -> None:
        self.share = share
        self.recorder = PassRecorder({(block, chosen.per_block - 1)}, chosen.count, geometry.tokens_per_frame, share)
        self.seconds = 0.0
        self.found: list[tuple[HeadRoles, Tensor]] = []

    def __call__(self, layer: int, q: Tensor, keys: Tensor, context: Sequence[int], values: Tensor) -> None:
        begin = time.perf_counter()
        self.recorder(layer, q, keys, context, values)
        self.seconds += time.perf_counter() - begin

    def finish(self, split: HeadSplit) -> None:
        """Keep what the video gave, and be ready for the next."""
        (attention,) = self.recorder.seen.values()
        self.found.append(split.find_roles(attention.by_frame()))
        self.recorder.begin()


def sampling_table(
    config: InferenceConfig, device: torch.device, jobs: Sequence[VideoJob], shares: Sequence[float] = SHARES
) -> SamplingTable:
    """Make the videos of `jobs` up to the pass in which roles are found. Raises InputError."""
    assert shares[0] == 1.0
    forcing = role_settings(config)
    split = split_of(forcing, config.num_frame_per_block)
    block = forcing.ar_start
    chosen = choose_passes(config, str(block), None)
    generator, embeds = watched_generator(config, jobs, watched_policy(config, "initial"), device)
    geometry = geometry_of(config, generator.model.config.in_dim)
    watched = [_Sampled(share, block, chosen, geometry) for share in shares]

    def watch_all(layer: int, q: Tensor, keys: Tensor, context: Sequence[int], values: Tensor) -> None:
        for one in watched:
            one(layer, q, keys, context, values)

    for job in jobs:
        watch(generator, geometry, job, embeds, watch_all, block)
        for one in watched:
            one.finish(split)
    rows = tuple(_row(one, watched[0], geometry.tokens_per_block) for one in watched)
    roles = watched[0].found[-1][0]
    return SamplingTable(rows, len(jobs), sum(roles.counts().values()), roles.counts()[Role.DUMMY])


def _row(one: _Sampled, every: _Sampled, queries: int) -> Row:
    errors, overlaps, others = [], [], []
    for (roles, shares), (true_roles, true_shares) in zip(one.found, every.found, strict=True):
        errors.append((shares - true_shares).abs())
        codes, true_codes = torch.tensor(roles.codes()), torch.tensor(true_roles.codes())
        dummy = (part.flatten() == int(Role.DUMMY) for part in (codes, true_codes))
        overlaps.append(float(overlap(*dummy)))
        others.append(int((codes != true_codes).sum()))
    error = torch.stack(errors)
    return Row(
        share=one.share,
        queries=sampled(queries, one.share, most=None),
        mean_error=float(error.mean()),
        largest_error=float(error.max()),
        dummy_overlap=fmean(overlaps),
        least_overlap=min(overlaps),
        other_roles=fmean(others),
        seconds=one.seconds / len(one.found),
    )
