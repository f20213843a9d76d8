"""What the block x step loop is given: settings, prompts, noise, and what runs the model's passes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from dummy.policy import ContextPolicy
from pipeline.config.arguments import whole_number
from pipeline.config.cache_rules import SwitchRules, check_rolling_length
from pipeline.runtime.schedule import DenoisingSchedule
from utils.errors import InputError
from wan.attention.cache import KVCache
from wan.geometry import MOST_FRAMES, LatentGeometry
from wan.transformer.model import TeaCacheResidual, TextContext, TimeContext

logger = logging.getLogger(__name__)


class NoiseSource(Protocol):
    """Standard normal noise for a batch of videos, in the order in which the loop asks for it."""

    def normal(self, shape: Sequence[int]) -> Tensor:
        """shape [n, C, h, w] of one video -> float32 [B, n, C, h, w]."""


@dataclass(frozen=True)
class Segment:
    """A prompt and the latent frame at or after which it takes effect (with the next block that begins), as another
    shot of the same scene or, with `cut`, as another scene."""

    start_frame: int
    text: TextContext
    cut: bool = False


@dataclass(frozen=True)
class GeneratorSettings:
    """What stays the same for all videos of a run.

    `first_schedule` is that of the first block that is made, or with `first_at_zero` of a block that begins the video.
    `window` is W of `local_attn_size`: what a switch re-encodes at most, and what positions span with `relative_rope`,
    unless `rope_window` says more. `kv_flush`: switches encode nothing anew, only the text changes; a cut then moves
    its block to `cut_from`. `rolling`: the most frames that a window of blocks sees, itself included, where several
    blocks are denoised at once.
    """

    schedule: DenoisingSchedule
    policy: ContextPolicy
    context_noise: float = 0.0
    window: int | None = None
    relative_rope: bool = False
    global_sink: bool = False
    reclassify_on_switch: bool = False
    teacache_threshold: float | None = None
    first_schedule: DenoisingSchedule | None = None
    first_at_zero: bool = False
    rope_window: int | None = None
    kv_flush: bool = False
    cut_from: int = 45
    rolling: int | None = None

    def check_switch(self, frame: int, cut: bool = False) -> None:
        """Raises InputError where there is no place for a prompt switch at latent frame `frame`."""
        span = self.rope_span if self.relative_rope else None
        SwitchRules(self.rolling is not None, self.kv_flush, self.policy.initial.rule, span).check(frame, cut)

    @property
    def rope_span(self) -> int | None:
        """Latent frames that relative positions span; None for absolute ones."""
        if self.rolling is not None:
            return self.rolling  # positions are absolute, but for the first block's, which go where a window has them
        return (self.rope_window or self.window) if self.relative_rope else None


class Passes(Protocol):
    """What the loop asks of a model; `CausalWanModel` describes it. `GraphedPasses` does it from recordings."""

    def __call__(
        self,
        latents: Tensor,
        time: TimeContext,
        text: TextContext,
        cache: KVCache,
        start_frame: int,
        commit: bool = False,
        residual: TeaCacheResidual | None = None,
    ) -> Tensor: ...

    def commit(
        self, latents: Tensor, time: TimeContext, text: TextContext, cache: KVCache, start_frame: int
    ) -> None: ...


def session_geometry(
    usual: LatentGeometry, frames: object, settings: GeneratorSettings, prefix: bool
) -> LatentGeometry:
    """The `usual` sizes for a video of so many latent `frames`, or with None without end, which begins with a `prefix`
    or with noise. Raises InputError where there is no such video."""
    block, rolling = usual.frames_per_block, settings.rolling is not None
    if rolling and prefix:
        raise InputError("start_from: has no meaning with a rolling window (rolling); remove one of the two")
    if frames is None:
        require_bounded(settings)
        return usual.endless()
    length = whole_number("frames", frames, 1, MOST_FRAMES + 1)
    if length % block:
        raise InputError(f"frames: {length} is no positive multiple of the block's {block} latent frames")
    if rolling:
        check_rolling_length(length, "frames", block, len(settings.schedule))
    return replace(usual, num_frames=length)


def require_bounded(settings: GeneratorSettings) -> None:
    """Raises InputError if a video without end would need memory without end."""
    encodes_all = settings.window is None and not settings.kv_flush and settings.rolling is None
    if encodes_all or not settings.policy.bounded:
        remedy = "model_kwargs.local_attn_size (published: 12)" if encodes_all else "rope=relative"
        raise InputError(
            f"frames: a session without end needs memory of a bounded length, but the policy {settings.policy.name} "
            f"keeps (or a prompt switch encodes anew) all earlier frames; set {remedy}, or give the session a number "
            "of frames"
        )
    if not settings.relative_rope and settings.rolling is None:
        logger.warning(
            "rope: absolute positions leave the trained range in a session without end; rope=relative stays in it"
        )
