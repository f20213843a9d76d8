"""The YAML section `dummy_forcing`: which attention heads lose their history, from when on, and what they keep.

Method: "Efficient Autoregressive Video Diffusion with Dummy Head" (arXiv 2601.20499); TeaCache: arXiv 2411.19108.
Conditions that involve the video's length or the model's size are not checked here: this file knows neither.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

from utils.errors import InputError


class HeadRetentions(NamedTuple):
    """What heads of each role keep of earlier frames, as (first frames, last frames) in latent frames."""

    sink: tuple[int, int]
    neighbor: tuple[int, int]
    dummy: tuple[int, int]


@dataclass(frozen=True)
class RetentionConfig:
    """`dummy_forcing.retention`: [sink, recent] latent frames a role; what is left out stays as in the paper.

    Raises:
        InputError: a negative number.
    """

    sink: tuple[int, int] = (1, 0)
    neighbor: tuple[int, int] | None = None  # null: [0, local_context_length * num_frame_per_block]
    dummy: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and min(value) < 0:
                raise InputError(
                    f"dummy_forcing.retention.{field.name}: [sink, recent] must be 0 or more latent frames each, "
                    f"got {list(value)}"
                )


@dataclass(frozen=True)
class DummyForcingConfig:
    """Settings of Dummy Forcing; with `enabled: false` the others are not looked at.

    Raises:
        InputError: a value out of range, or a retention for a policy that has none.
    """

    enabled: bool = True
    policy: Literal["packed", "prune"] = "packed"
    denoise_start: int = 0  # denoising step from which heads are split; published programs work with 0 alone
    ar_start: int = 1  # block, counted from 0, in whose clean pass the head roles are found
    local_context_length: int = 1  # L, blocks that neighbour heads (before the split: all heads) look back
    num_dummy: int = 180  # heads made dummy, of layers x heads (360 in Wan 1.3B)
    sink_score_frames: int = 1  # first context frames whose attention counts as sink
    score_query_share: float = 0.25  # share of the block's queries that are scored; the paper takes 25 %
    retention: RetentionConfig | None = None
    roles: str | None = None  # file of saved head roles; null: observe them in every video
    reclassify_on_switch: bool = False  # find the roles anew after a prompt switch
    teacache_enabled: bool = False
    teacache_threshold: float = 0.2  # accumulated relative change below which a step is skipped

    def __post_init__(self) -> None:
        if not self.enabled:
            return
        if self.denoise_start != 0:
            raise InputError(f"dummy_forcing.denoise_start: only 0 works, got {self.denoise_start}")
        observing = ("ar_start", "sink_score_frames") if self.roles is None else ()
        for name in ("local_context_length", *observing):
            if getattr(self, name) < 1:
                raise InputError(f"dummy_forcing.{name}: must be 1 or more, got {getattr(self, name)}")
        if self.num_dummy < 0:
            raise InputError(f"dummy_forcing.num_dummy: must be 0 or more heads, got {self.num_dummy}")
        if not 0 < self.score_query_share <= 1:
            raise InputError(
                "dummy_forcing.score_query_share: must be above 0 and at most 1 (all queries), "
                f"got {self.score_query_share}"
            )
        if self.teacache_threshold < 0:
            raise InputError(f"dummy_forcing.teacache_threshold: must be 0 or more, got {self.teacache_threshold}")
        if self.policy == "prune" and self.retention is not None:
            raise InputError(
                "dummy_forcing.retention: policy prune drops all earlier frames of dummy heads and leaves the other "
                "heads as they are; remove the retention or use dummy_forcing.policy=packed"
            )

    def retentions(self, num_frame_per_block: int) -> HeadRetentions:
        """What the `packed` policy keeps after the split, for blocks of that many latent frames (n); defaults as in
        the paper: sink heads the first frame, neighbour heads the last L n frames, dummy heads the last frame."""
        given = self.retention or RetentionConfig()
        neighbor = given.neighbor or (0, self.local_context_length * num_frame_per_block)
        return HeadRetentions(given.sink, neighbor, given.dummy)
