"""What a video's cache and the passes over it take in memory, by the stages of the video: found on the meta device.

Sizes come from the classes that a run uses. This file knows neither the decoder nor what a device has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from dummy.frame_attention import FrameAttention
from dummy.policy import HeadSplit
from pipeline.planning.cost import assumed_roles
from pipeline.runtime.inputs import GeneratorSettings
from utils.memory import PeakTracker
from wan.attention.cache import KVCache
from wan.attention.head_group import CacheBytes, Observer
from wan.geometry import LatentGeometry
from wan.transformer.model import CausalWanModel


@dataclass(frozen=True)
class Stage:
    """Bytes: what the cache holds, and what a pass takes on top of it at its worst moment."""

    cache: CacheBytes
    activations: int

    @property
    def total(self) -> int:
        return self.cache.total + self.activations


@dataclass(frozen=True)
class VideoStages:
    """Of `batch` videos at a time. `block`: any block once the roles of heads are known; `before_split`: the block in
    which they are observed, if they are; `switch`: the pass that encodes earlier frames anew for another prompt, and,
    if that is asked for, the block after it, in which roles are observed again."""

    block: Stage
    before_split: Stage | None = None
    switch: Stage | None = None

    def __iter__(self) -> Iterator[Stage]:
        return (stage for stage in (self.before_split, self.block, self.switch) if stage is not None)


@dataclass(frozen=True)
class StagePlanner:
    """For one model (on the meta device, with an attention that allocates its result alone), settings and geometry."""

    model: CausalWanModel
    geometry: LatentGeometry
    settings: GeneratorSettings
    batch: int = 1

    def stages(self, switches: Sequence[int] = ()) -> VideoStages:
        """`switches`: latent frames at or after which another prompt takes effect; the last one encodes the most."""
        split = self.settings.policy.split
        observed = split is not None and not split.from_start
        block = self.geometry.frames_per_block
        until_split = split.ar_start * block if split is not None and observed else None
        relative = self.settings.window if self.settings.relative_rope else None
        cache = self.model.new_cache(
            self.geometry, self.batch, self.settings.policy.initial, relative, None, until_split
        )
        before = None
        if split is not None:
            if until_split is not None:
                before = self._observed(cache, split, until_split)
            roles = assumed_roles(self.model.config, split, self.geometry.num_frames - block)
            cache.allocate(split.layout(roles))
        steady = Stage(cache.bytes(), self._pass(cache, self.geometry.frames_per_block))
        start = min(-(-max(switches, default=0) // block) * block, self.geometry.num_frames - block)
        return VideoStages(steady, before, self._switch(cache, start) if start else None)

    def _observed(self, cache: KVCache, split: HeadSplit, past: int) -> Stage:
        """The clean pass of the block after `past` frames, in which the attention of heads is measured."""
        block = self.geometry.frames_per_block
        for start in range(0, past, block):
            cache.append_current_block(range(start, start + block))
        observer = FrameAttention(self.geometry.tokens_per_frame, split.query_share) if split.roles is None else None
        return Stage(cache.bytes(), max(self._pass(cache, block), self._pass(cache, block, observer)))

    def _switch(self, cache: KVCache, start: int) -> Stage:
        """Going over to another prompt at the block that begins at frame `start`."""
        split, count = self.settings.policy.split, min(self.settings.window or start, start)
        if split is None or not self.settings.reclassify_on_switch:
            cache.forget()
            return Stage(cache.bytes(), self._pass(cache, count))
        cache.reset(self.settings.policy.initial, start)
        encoding = self._pass(cache, count)
        cache.forget()
        observed = self._observed(cache, split, min(count, self.settings.policy.initial.total))
        return Stage(observed.cache, max(encoding, observed.activations))

    def _pass(self, cache: KVCache, frames: int, observer: Observer | None = None) -> int:
        """The most that a pass over so many frames takes beside the cache."""
        config, geometry, meta = self.model.config, self.geometry, self.model.device
        with torch.inference_mode():
            time = self.model.encode_time(0.0)
            embeds = torch.empty(self.batch, config.text_len, config.text_dim, device=meta)
            text = self.model.encode_text(embeds)
            shape = (self.batch, frames, geometry.channels, geometry.height, geometry.width)
            latents = torch.empty(shape, device=meta)
            with PeakTracker() as tracker, cache.observed(observer) if observer is not None else nullcontext():
                if frames > geometry.frames_per_block:
                    self.model.commit(latents, time, text, cache, 0)
                else:
                    self.model(latents, time, text, cache, 0)
            return int(tracker.peak)


def no_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as fused kernels do it: nothing but the result is allocated."""
    return torch.empty_like(q)
