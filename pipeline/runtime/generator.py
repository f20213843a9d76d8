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

import torch
from torch import Tensor

from dummy.frame_attention import FrameAttention
from dummy.policy import HeadSplit
from dummy.teacache import computed_steps
from pipeline.runtime.inputs import GeneratorSettings, NoiseSource, Passes, Segment
from utils.profiler import Profiler
from utils.transfer import to_device
from wan.attention.cache import KVCache
from wan.attention.head_group import HeadLayout
from wan.geometry import LatentGeometry
from wan.transformer.model import CausalWanModel, TeaCacheResidual, TextContext


@dataclass(frozen=True)
class CleanBlock:
    """Finished latents [B, n, C, h, w], float32, of the frames from `start_frame` on."""

    index: int
    start_frame: int
    latents: Tensor


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
        live: bool = False,
        videos: int | None = None,
    ) -> Rollout:
        """A video, or `batch` of them with common head roles, made with one prompt a segment. The first `videos` of the
        batch are meant; others, which fill it up to a size that the engine is ready for, have no part in the roles.

        `live` videos take prompts while they are made (`Rollout.prompt`); they may begin without segments.

        `prefix_latents` [B, F, C, h, w] are finished latents of whole blocks that the video begins with.
        `profiler` receives a span "denoise" per block, in which a prompt switch is done too, and a span "clean".
        """
        profiler = profiler or Profiler(self.model.device)
        return Rollout(self, geometry, tuple(segments), noise, batch, profiler, prefix_latents, live, videos)

    def acquire_cache(self, geometry: LatentGeometry, batch: int, layout: HeadLayout | None) -> KVCache:
        """An empty cache in which heads keep what the layout says, or all of them what the policy begins with.

        Nobody else has it until it is released.
        """
        if self._spare is not None and self._spare[:2] != (geometry, batch):
            self._spare = None
        policy = self.settings.policy
        until_split = None if policy.split is None else policy.split.ar_start * geometry.frames_per_block
        if self._spare is None:
            window = self.settings.window if self.settings.relative_rope else None
            return self.model.new_cache(geometry, batch, policy.initial, window, layout, until_split)
        cache, self._spare = self._spare[2], None
        if layout is None:
            cache.reset(policy.initial, until_split)
        else:
            cache.allocate(layout)
        return cache

    def release_cache(self, cache: KVCache, geometry: LatentGeometry, batch: int) -> None:
        """Let the next video have the cache."""
        self._spare = geometry, batch, cache

    def drop_spare_cache(self) -> None:
        """Free the cache that waits for the next video, and with it what was captured over it."""
        self._spare = None


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
        live: bool = False,
        videos: int | None = None,
    ) -> None:
        assert live or (segments and segments[0].start_frame == 0)
        self._generator = generator
        self._model = generator.model
        self._settings = settings = generator.settings
        self._geometry = geometry
        self._text: TextContext | None = None  # what the block at work is made with
        self._pending = deque(segments)
        self._prompted: TextContext | None = None
        self._live = live
        self.keep_past = live  # clean frames, for prompts to come
        self._noise = noise
        self._profiler = profiler
        whole = geometry.frames_per_block
        self._prefix_latents = deque() if prefix_latents is None else deque(torch.split(prefix_latents, whole, dim=1))
        self._past: deque[Tensor] = deque(maxlen=settings.window)  # clean frames [B, C, h, w], for prompt switches
        self._observed_block = self._split.ar_start if self._split else None
        self.roles = self._split.roles if self._split else None
        self.frame_attention: Tensor | None = None
        self.record = FlowRecord(0)
        self.forwards = 0  # all of them, of which `skipped` did not run the layers
        self.skipped = 0
        layout = settings.policy.fixed_layout()
        if layout is not None:
            self._observed_block = None
        self.roles_pending = self._split is not None and layout is None
        """Whether head roles are yet to be observed, after which the cache is laid out anew."""
        self._batch = batch
        self._videos = batch if videos is None else videos
        self.cache = generator.acquire_cache(geometry, batch, layout)

    @property
    def _split(self) -> HeadSplit | None:
        return self._settings.policy.split

    @property
    def _passes(self) -> Passes:
        """Graphs captured over a layout that goes after a block or two would cost more than they save."""
        return self._model if self.roles_pending else self._generator.passes

    def prompt(self, text: TextContext) -> None:
        """Let a prompt take effect with the next block that begins, as a segment that starts there would. For videos
        that were started `live`; may be called while a block is made, from another thread too."""
        assert self._live
        self._prompted = text

    @torch.inference_mode()
    def blocks(self) -> Generator[CleanBlock, None, None]:
        """Yield every block as soon as it is clean; the clean pass follows when the next block is asked for."""
        try:
            yield from self._blocks()
        finally:
            self._generator.release_cache(self.cache, self._geometry, self._batch)

    def _blocks(self) -> Iterator[CleanBlock]:
        starts = self._geometry.block_starts()
        for index, start in enumerate(starts):
            with self._profiler.span("denoise"):
                if self._take_prompt(start) and index:
                    self._switch(start, index)
                self.cache.begin_pass(start, self._geometry.frames_per_block)
                x0 = self._prefix_latents.popleft() if self._prefix_latents else self.denoise(self.text, start)
            yield CleanBlock(index, start, x0)
            if start != starts[-1] or self.record.limit:
                self.clean_pass(x0, self.text, start, index)
                if self._pending or self.keep_past:
                    self._past.extend(x0.unbind(1))

    @property
    def text(self) -> TextContext:
        """The prompt of the block at work."""
        assert self._text is not None, "a video begins with a prompt"
        return self._text

    def _take_prompt(self, start: int) -> bool:
        """Go over to the prompt that is due at frame `start`; whether there is one."""
        due, self._prompted = self._prompted, None
        while self._pending and self._pending[0].start_frame <= start:
            due = self._pending.popleft().text
        self._text = due or self._text
        return due is not None

    def _draw(self) -> Tensor:
        return to_device(self._noise.normal(self._geometry.block_shape), self._model.device)

    def denoise(self, text: TextContext, start: int) -> Tensor:
        """The schedule's steps for the block that begins at frame `start`; returns x0 [B, n, C, h, w]."""
        schedule, steps = self._settings.schedule, self._generator.steps
        residual = None if all(self._generator.computed) else TeaCacheResidual()
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
        due = self._split is not None and index == self._observed_block
        observer = self._observer() if due and self.roles is None else None
        with self._profiler.span("clean"), self.cache.observed(observer) if observer else nullcontext():
            self._encode(x0, text, start, join=not due)
        if observer is not None and self._split is not None:
            self.roles, self.frame_attention = self._split.find_roles(observer.by_frame())
        if due:
            self._apply_roles(range(start, start + x0.shape[1]))

    def _apply_roles(self, current: range) -> None:
        """From here on every head keeps what its role keeps; the frames `current` join the cache."""
        assert self._split is not None and self.roles is not None
        last = current.stop == self._geometry.num_frames
        self.cache.split(self._split.layout(self.roles), range(0) if last else current)
        self.roles_pending = False

    def _switch(self, start: int, index: int) -> None:
        """Re-encode the last clean frames under a new prompt, in one pass in which they all see each other.

        The pass is at `context_noise`, as those are that it stands for. Roles that are to be observed again take the
        sinks with them, since afterwards only some heads have any.
        """
        observe_again = self._settings.reclassify_on_switch and self._split is not None
        if observe_again:
            self._observed_block = index
            self.roles = None
            self.roles_pending = True
            self.cache.reset(self._settings.policy.initial, start)  # heads are split again after this block
        window = self._settings.window or start
        keep_sinks = self._settings.global_sink and window < start and not observe_again
        count = min(window, start)
        if keep_sinks:
            count -= self._settings.policy.window_sinks
        first = start - count
        self.cache.forget(keep_sinks_before=first if keep_sinks else 0)
        if not count:
            return
        self.cache.begin_pass(first, count)
        frames = torch.stack(list(self._past)[-count:], dim=1)
        self._encode(frames, self.text, first)

    def _encode(self, latents: Tensor, text: TextContext, start: int, join: bool = True) -> None:
        """Let the keys and values of clean frames from `start` on join the cache, which has no room for the last; or
        leave them, a block's, in the own slots."""
        clean, last = self._generator.clean, start + latents.shape[1] == self._geometry.num_frames
        if self.record.open or last:
            flow = self._passes(latents, clean, text, self.cache, start, commit=join and not last)
            self._count(flow, computed=True)
            return
        if join:
            self._passes.commit(latents, clean, text, self.cache, start)
        else:
            self._model.encode(latents, clean, text, self.cache, self._model.rotation(latents, start))
        self.forwards += 1

    def _observer(self) -> FrameAttention:
        assert self._split is not None
        return FrameAttention(self._geometry.tokens_per_frame, self._split.query_share, videos=self._videos)

    def _count(self, flow: Tensor, computed: bool) -> None:
        self.record.add(flow)
        self.forwards += 1
        self.skipped += not computed
