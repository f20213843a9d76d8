"""What the block x step loop is given: settings, prompts, noise, and what runs the model's passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dummy.policy import ContextPolicy
from pipeline.runtime.schedule import DenoisingSchedule
from wan.attention.cache import KVCache
from wan.transformer.model import TeaCacheResidual, TextContext, TimeContext


class NoiseSource(Protocol):
    """Standard normal noise for a batch of videos, in the order in which the loop asks for it."""

    def normal(self, shape: Sequence[int]) -> Tensor:
        """shape [n, C, h, w] of one video -> float32 [B, n, C, h, w]."""


@dataclass(frozen=True)
class Segment:
    """A prompt and the latent frame at or after which it takes effect (with the next block that begins)."""

    start_frame: int
    text: TextContext


@dataclass(frozen=True)
class GeneratorSettings:
    """What stays the same for all videos of a run."""

    schedule: DenoisingSchedule
    policy: ContextPolicy
    context_noise: float = 0.0
    window: int | None = None  # W, latent frames: the most that a switch re-encodes; what relative RoPE spans
    relative_rope: bool = False
    global_sink: bool = False
    reclassify_on_switch: bool = False
    teacache_threshold: float | None = None


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
