"""What a video may show of its heads while it is made, and what follows from that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dummy.roles import HeadRoles
from wan.attention.head_group import HeadLayout, Observer


@dataclass(frozen=True)
class Outcome:
    """What every head is to keep from now on and, if heads have roles, these, with the attention [layers, heads, 3] to
    sink, neighbour and current frames that they follow from."""

    layout: HeadLayout
    roles: HeadRoles | None = None
    frame_attention: Tensor | None = None


class Observed(Protocol):
    """How heads part by what an observer sees in block `ar_start` of the video, from the next block on."""

    @property
    def ar_start(self) -> int: ...

    @property
    def in_clean_pass(self) -> bool:
        """Whether the block's clean pass is observed, or its denoising passes."""

    def observer(self, tokens_per_frame: int, videos: int | None, grams: Callable[[], Sequence[Tensor]]) -> Observer:
        """For one video, or the first `videos` of a batch; `grams`: of the heads that are observed, if they are needed,
        as dummy.calibration.recorder.HeadErrors takes them."""

    def outcome(self, seen: Observer, all_heads: Callable[[Tensor], Tensor]) -> Outcome:
        """`all_heads` gathers [layers, own heads, ...] from all processes."""
