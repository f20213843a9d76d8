"""What a video's cache and the passes over it take in memory, by the stages of the video: found on the meta device.

Sizes come from the classes that a run uses. This file knows neither the decoder nor what a device has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from dummy.observed import Observed
from pipeline.planning.cost import assumed_layout
from pipeline.runtime.inputs import GeneratorSettings
from pipeline.runtime.windows import Window, rolling_context
from utils.memory import PeakTracker
from wan.attention.cache import KVCache
from wan.attention.exchange import own_share
from wan.attention.head_group import CacheBytes, Observer
from wan.geometry import LatentGeometry
from wan.transformer.model import CausalWanModel, TeaCacheResidual, TimeContext


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
    """Of `batch` videos at a time, beside the keys and values of their prompt (`text`).

    `block`: any block once it is known what heads keep; `before_split`: the block in which that is observed, if it is.
    Where prompts switch, `prompt`: the clean pass of the block before, while those of the next prompt are there
    beside its own; `switch`: the pass that encodes earlier frames anew, and, if that is asked for, the block after it,
    in which heads are observed again.
    """

    text: int
    block: Stage
    before_split: Stage | None = None
    prompt: Stage | None = None
    switch: Stage | None = None

    def __iter__(self) -> Iterator[Stage]:
        stages = self.before_split, self.block, self.prompt, self.switch
        return (stage for stage in stages if stage is not None)


class StagePlanner:
    """For one model (on the meta device, with an attention that allocates its result alone), settings and geometry."""

    @torch.inference_mode()
    def __init__(
        self, model: CausalWanModel, geometry: LatentGeometry, settings: GeneratorSettings, batch: int = 1
    ) -> None:
        self._model = model
        self._geometry = geometry
        self._settings = settings
        self._batch = batch
        self._time = model.encode_time(0.0)
        embeds = torch.empty(batch, model.config.text_len, model.config.text_dim, device=model.device)
        with PeakTracker() as tracker:
            self._text = model.encode_text(embeds)
        self._text_bytes = sum(part.nbytes for part in (*self._text.keys, *self._text.values))
        self._encoding_text = tracker.peak

    def stages(self, switches: Iterable[int] = ()) -> VideoStages:
        """`switches`: the latent frames at or after which another prompt takes effect."""
        policy, block = self._settings.policy, self._geometry.frames_per_block
        layout, before, clean, switch = policy.fixed_layout(), None, None, None
        split = policy.observed if layout is None else None
        until_split = None if split is None else split.ar_start * block
        span = self._settings.rope_span
        cache = self._model.new_cache(self._geometry, self._batch, policy.initial, span, layout, until_split)
        last = self._geometry.num_frames - block
        starts = sorted({min(-(-frame // block) * block, last) for frame in switches} - {0})
        early = [start for start in starts if until_split is not None and start <= until_split]
        if split is not None and until_split is not None:
            switch = self._switch(cache, early[-1]) if early and not self._settings.kv_flush else None
            cache.reset(policy.initial, until_split)
            self._fill(cache, until_split)
            before = self._observed(cache, split)
            clean = before if split.in_clean_pass else Stage(before.cache, self._block(cache))
            parted = assumed_layout(self._model.config, policy, last)
            assert parted is not None
            cache.allocate(parted)
        steady = Stage(cache.bytes(), max(self._block(cache), self._rolling(cache)))
        if len(early) < len(starts) and not self._settings.kv_flush:
            late = self._switch(cache, starts[-1])
            switch = late if switch is None or switch.total < late.total else switch
        observed = [start for start in starts if until_split is not None and start <= until_split + block]
        passes = [clean] if clean is not None and observed else []
        passes += [steady] if len(observed) < len(starts) else []
        return VideoStages(self._text_bytes, steady, before, self._prompt(passes), switch)

    def _prompt(self, passes: Sequence[Stage]) -> Stage | None:
        """The largest of `passes` with another prompt beside its own."""
        if not passes:
            return None
        largest = max(passes, key=lambda stage: stage.total)
        return Stage(largest.cache, max(largest.activations + self._text_bytes, self._encoding_text))

    def _fill(self, cache: KVCache, frames: int) -> None:
        block = self._geometry.frames_per_block
        for start in range(0, frames, block):
            cache.append_current_block(range(start, start + block))

    def _observed(self, cache: KVCache, split: Observed) -> Stage:
        """The block in which it is observed what parts the heads."""
        measure = split.observer(self._geometry.tokens_per_frame, None, self._grams)

        def observer(layer: int, q: Tensor, keys: Tensor, context: Sequence[int], values: Tensor) -> None:
            if not layer:  # measuring takes as much in all of them
                measure(layer, q, keys, context, values)

        return Stage(cache.bytes(), max(self._block(cache), self._block(cache, observer)))

    def _grams(self) -> list[Tensor]:
        heads, width = len(own_share(self._model.config.num_heads, self._model.exchange)), self._model.config.head_dim
        return [torch.empty(heads, width, width, device=self._model.device) for _ in self._model.layers()]

    def _switch(self, cache: KVCache, start: int) -> Stage:
        """Going over to another prompt at the block that begins at frame `start`, as the loop does."""
        settings, split = self._settings, self._settings.policy.observed
        window = settings.window or start
        count = min(window, start)
        observed_again = settings.reclassify_on_switch and split is not None
        if observed_again:
            cache.reset(settings.policy.initial, start)
        elif settings.global_sink and window < start:
            count -= settings.policy.window_sinks
            self._fill(cache, settings.policy.window_sinks)
            cache.forget(keep_sinks_before=start - count)
        else:
            cache.forget()
        stage = Stage(cache.bytes(), self._encode(cache, start - count, count) if count else 0)
        if split is None or not observed_again:
            return stage
        return Stage(stage.cache, max(stage.activations, self._observed(cache, split).activations))

    def _block(self, cache: KVCache, observer: Observer | None = None) -> int:
        """The most that a pass over a block takes beside the cache; observed, or, if any step is left out for what
        another has found, one that comes after such a one."""
        latents = self._latents(self._geometry.frames_per_block)
        left_out = observer is None and self._settings.teacache_threshold is not None
        residual = TeaCacheResidual() if left_out else None

        def forward() -> None:
            for _ in range(1 + left_out):
                self._model(latents, self._time, self._text, cache, 0, residual=residual)

        with cache.observed(observer) if observer is not None else nullcontext():
            return _peak(forward)

    def _rolling(self, cache: KVCache) -> int:
        """As `_block`, of a pass over as many blocks as are denoised at once; 0 where it is one."""
        most, block = self._settings.rolling, self._geometry.frames_per_block
        if most is None:
            return 0
        blocks = min(len(self._settings.schedule), self._geometry.num_blocks)
        window = Window(min(-(-most // block), self._geometry.num_blocks - blocks), tuple(reversed(range(blocks))))
        start, frames = window.first * block, blocks * block
        self._fill(cache, start)
        context, sinks_at = rolling_context(window, block, most)
        cache.begin_pass(start, frames, context=context, sinks_at=sinks_at)
        latents, time = self._latents(frames), TimeContext.by_frame([self._time] * frames)
        return _peak(lambda: self._model(latents, time, self._text, cache, start))

    def _encode(self, cache: KVCache, first: int, count: int) -> int:
        """As `_block`, of the pass in which `count` frames from `first` on join the cache."""
        latents = self._latents(count)
        return _peak(lambda: self._model.commit(latents, self._time, self._text, cache, first))

    def _latents(self, frames: int) -> Tensor:
        shape = self._batch, frames, self._geometry.channels, self._geometry.height, self._geometry.width
        latents = torch.empty(shape, device=self._model.device)
        self._model.rotation(latents, -1)  # so that a pass makes a table of its own, as every block's first one does
        return latents


def _peak(work: Callable[[], None]) -> int:
    with torch.inference_mode(), PeakTracker() as tracker:
        work()
    return int(tracker.peak)


def no_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as fused kernels do it: nothing but the result is allocated."""
    return torch.empty_like(q)
