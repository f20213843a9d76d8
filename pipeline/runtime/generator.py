"""The one block x step loop: from noise and prompts to clean latent blocks.

A video is generated block by block; each block is denoised in the schedule's steps over the cache of what came before,
yielded, and then passed once more at timestep `context_noise` so that its keys and values join the cache. A storyboard
is a list of segments, a single prompt a list of one. The loop knows no files, no VAE and no text encoder, and reads no
value from the device except, once a video, the head roles that it has observed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from dummy.frame_attention import FrameAttention
from dummy.policy import ContextPolicy, HeadSegments, HeadSplit
from dummy.teacache import computed_steps
from pipeline.runtime.schedule import DenoisingSchedule
from utils.profiler import Profiler
from utils.transfer import to_device
from wan.attention.cache import KVCache
from wan.geometry import LatentGeometry
from wan.transformer.model import CausalWanModel, TeaCacheResidual, TextContext, TimeContext


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
class CleanBlock:
    """Finished latents [B, n, C, h, w], float32, of the frames from `start_frame` on."""

    index: int
    start_frame: int
    latents: Tensor


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


class BlockGenerator:
    """Generates videos with one model; make a `Rollout` for each.

    A video's cache serves the next video of the same sizes again, so that what was recorded over it does too.
    """

    def __init__(self, model: CausalWanModel, settings: GeneratorSettings, passes: Passes | None = None) -> None:
        """`passes`: what runs the model's passes, the model itself by default."""
        self.model = model
        self.settings = settings
        self.passes: Passes = passes or model
        self._spare: tuple[LatentGeometry, int, KVCache] | None = None
        with torch.inference_mode():
            self.steps = tuple(model.encode_time(timestep) for timestep in settings.schedule.timesteps)
            self.clean = model.encode_time(settings.context_noise)
        self.computed = computed_steps([time.modulation for time in self.steps], settings.teacache_threshold)

    def start(
        self,
        geometry: LatentGeometry,
        segments: Sequence[Segment],
        noise: NoiseSource,
        batch: int = 1,
        profiler: Profiler | None = None,
        prefix_latents: Tensor | None = None,
    ) -> Rollout:
        """A video, or `batch` of them with common head roles, made with one prompt a segment.

        `prefix_latents` [B, F, C, h, w] are finished latents of whole blocks that the video begins with.
        `profiler` receives a span "denoise" per block, in which a prompt switch is done too, and a span "clean".
        """
        profiler = profiler or Profiler(self.model.device)
        return Rollout(self, geometry, tuple(segments), noise, batch, profiler, prefix_latents)

    def acquire_cache(
        self, geometry: LatentGeometry, batch: int, head_segments: Sequence[HeadSegments] | None
    ) -> KVCache:
        """An empty cache in which the heads of layer l keep head_segments[l], or all of them what the policy begins
        with.

        Nobody else has it until it is given back.
        """
        if self._spare is not None and self._spare[:2] != (geometry, batch):
            self._spare = None
        initial = self.settings.policy.initial
        if self._spare is None:
            relative_window = self.settings.window if self.settings.relative_rope else None
            return self.model.new_cache(geometry, batch, initial, relative_window, head_segments)
        cache, self._spare = self._spare[2], None
        if head_segments is None:
            cache.reset(initial)
        else:
            cache.allocate(head_segments)
        return cache

    def release_cache(self, cache: KVCache, geometry: LatentGeometry, batch: int) -> None:
        """Let the next video have the cache."""
        self._spare = geometry, batch, cache


@dataclass
class FlowRecord:
    """The flows of the first `limit` forwards, for comparison with other implementations.

    As long as it is not full, passes that only fill the cache compute the flow too, and with any limit the last block
    has a clean pass, neither of which anybody else needs.
    """

    limit: int
    flows: list[Tensor] = field(default_factory=list)

    @property
    def open(self) -> bool:
        return len(self.flows) < self.limit

    def add(self, flow: Tensor) -> None:
        if self.open:
            self.flows.append(flow)


class Rollout:
    """One video (or batch) in the making: its cache, its roles, its place. Iterate over `blocks()` once."""

    def __init__(
        self,
        generator: BlockGenerator,
        geometry: LatentGeometry,
        segments: tuple[Segment, ...],
        noise: NoiseSource,
        batch: int,
        profiler: Profiler,
        prefix_latents: Tensor | None = None,
    ) -> None:
        assert segments and segments[0].start_frame == 0
        self._generator = generator
        self._model = generator.model
        self._settings = settings = generator.settings
        self._geometry = geometry
        self._segments = segments
        self._noise = noise
        self._profiler = profiler
        self._prefix_latents = (
            deque() if prefix_latents is None else deque(torch.split(prefix_latents, geometry.frames_per_block, dim=1))
        )
        self._past: deque[Tensor] = deque(maxlen=settings.window)  # clean frames [B, C, h, w], for prompt switches
        self._order: list[list[int]] | None = None  # of the model's heads
        self._observed_block = self._split.ar_start if self._split else None
        self.roles = self._split.roles if self._split else None
        self.frame_attention: Tensor | None = None
        self.record = FlowRecord(0)
        self.forwards = 0  # all of them, of which `skipped` did not run the layers
        self.skipped = 0
        head_segments = None
        if self._split is not None and self._split.from_start and self.roles is not None:
            self._observed_block = None
            self._order, head_segments = self._split.layout(self.roles)
        self._batch = batch
        self.cache = generator.acquire_cache(geometry, batch, head_segments)

    @property
    def _split(self) -> HeadSplit | None:
        return self._settings.policy.split

    @property
    def roles_pending(self) -> bool:
        """Whether head roles are yet to be observed, after which the cache is laid out anew."""
        return self._split is not None and self._order is None

    @property
    def _passes(self) -> Passes:
        """Recordings over a layout that goes after a block or two would cost more than they save."""
        return self._model if self.roles_pending else self._generator.passes

    @torch.inference_mode()
    def blocks(self) -> Generator[CleanBlock, None, None]:
        """Yield every block as soon as it is clean; the clean pass follows when the next block is asked for."""
        try:
            yield from self._blocks()
        finally:
            self._generator.release_cache(self.cache, self._geometry, self._batch)

    def _blocks(self) -> Iterator[CleanBlock]:
        text = self._segments[0].text
        pending = deque(self._segments[1:])
        starts = self._geometry.block_starts()
        for index, start in enumerate(starts):
            with self._profiler.span("denoise"):
                if pending and pending[0].start_frame <= start:
                    while pending and pending[0].start_frame <= start:
                        text = pending.popleft().text
                    self._switch(text, start, index)
                self.cache.begin_pass(start, self._geometry.frames_per_block)
                x0 = self._prefix_latents.popleft() if self._prefix_latents else self.denoise(text, start)
            yield CleanBlock(index, start, x0)
            if start != starts[-1] or self.record.limit:
                self.clean_pass(x0, text, start, index)
                if pending:
                    self._past.extend(x0.unbind(1))

    def _draw(self) -> Tensor:
        return to_device(self._noise.normal(self._geometry.block_shape), self._model.device)

    def denoise(self, text: TextContext, start: int) -> Tensor:
        """The schedule's steps for the block that begins at frame `start`; returns x0 [B, n, C, h, w]."""
        schedule, steps = self._settings.schedule, self._generator.steps
        residual = None if all(self._generator.computed) else TeaCacheResidual()
        self._model.set_head_order(self._order)
        x = self._draw()
        for step, (time, compute) in enumerate(zip(steps, self._generator.computed, strict=True)):
            if compute:
                flow = self._passes(x, time, text, self.cache, start, residual=residual)
            else:
                assert residual is not None
                flow = self._model.skip_layers(x, time, residual)
            self._count(flow, compute)
            x0 = schedule.predict_x0(x, flow, step)
            if step + 1 < len(steps):
                x = schedule.renoise(x0, self._draw(), step + 1)
        return x0

    def clean_pass(self, x0: Tensor, text: TextContext, start: int, index: int) -> None:
        """Let the block's keys and values join the cache; find and apply the head roles if it is the time.

        The first step of the next block could share this pass, at the price of a loop that knows two blocks at once;
        `python -m benchmarks.merged` measures the most that it could save.
        """
        self._model.set_head_order(self._order)
        due = self._split is not None and index == self._observed_block
        observer = self._observer() if due and self.roles is None else None
        with self._profiler.span("clean"), self.cache.observed(observer) if observer else nullcontext():
            self._encode(x0, text, start)
        if observer is not None and self._split is not None:
            self.roles, self.frame_attention = self._split.find_roles(observer.by_frame())
        if due:
            self._apply_roles()

    def _apply_roles(self) -> None:
        """From here on every head keeps what its role keeps."""
        assert self._split is not None and self.roles is not None
        self._order, head_segments = self._split.layout(self.roles)
        self.cache.split(self._order, head_segments)

    def _switch(self, text: TextContext, start: int, index: int) -> None:
        """Re-encode the last clean frames under a new prompt, in one pass in which they all see each other.

        The pass is at `context_noise`, as those are that it stands for. Roles that are to be observed again take the
        sinks with them, since afterwards only some heads have any.
        """
        observe_again = self._settings.reclassify_on_switch and self._split is not None
        if observe_again:
            self._observed_block = index
            self.roles = None
            self._order = None
            self.cache.reset(self._settings.policy.initial)
        window = self._settings.window or start
        keep_sinks = self._settings.global_sink and window < start and not observe_again
        count = min(window, start)
        if keep_sinks:
            count -= self._settings.policy.window_sinks
        first = start - count
        self.cache.forget(keep_sinks_before=first if keep_sinks else 0)
        if not count:
            return
        self._model.set_head_order(self._order)
        self.cache.begin_pass(first, count)
        frames = torch.stack(list(self._past)[-count:], dim=1)
        self._encode(frames, text, first)

    def _encode(self, latents: Tensor, text: TextContext, start: int) -> None:
        """Let the keys and values of clean frames from `start` on join the cache, which has no room for the last."""
        clean, last = self._generator.clean, start + latents.shape[1] == self._geometry.num_frames
        if self.record.open or last:
            self._count(self._passes(latents, clean, text, self.cache, start, commit=not last), computed=True)
        else:
            self._passes.commit(latents, clean, text, self.cache, start)
            self.forwards += 1

    def _observer(self) -> FrameAttention:
        assert self._split is not None
        return FrameAttention(self._geometry.tokens_per_frame, self._split.query_share)

    def _count(self, flow: Tensor, computed: bool) -> None:
        self.record.add(flow)
        self.forwards += 1
        self.skipped += not computed
