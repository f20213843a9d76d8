"""The one loop over passes: from noise and prompts to clean latent blocks.

A video is generated block by block; each block is denoised in the schedule's steps over the cache of what came before,
alone or in a rolling window with its neighbours (pipeline/runtime/windows.py), yielded, and then passed once more at
timestep `context_noise` so that its keys and values join the cache. A storyboard is a list of segments, a single prompt
a list of one. The loop knows no files, no VAE and no text encoder, and reads no value from the device except, once a
video, what it has observed of the heads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from dummy.roles import HeadRoles
from pipeline.runtime.denoising import Denoising
from pipeline.runtime.inputs import GeneratorSettings, NoiseSource, Passes, Segment
from pipeline.runtime.output_weights import gates_of, output_grams
from pipeline.runtime.outputs import CleanBlock, FlowRecord
from pipeline.runtime.parting import Parting, beginning
from pipeline.runtime.windows import Round, Window, one_by_one, rolling, rolling_context
from utils.profiler import Profiler
from utils.transfer import to_device
from wan.attention.cache import KVCache
from wan.attention.exchange import own_share
from wan.attention.head_group import HeadLayout
from wan.geometry import LatentGeometry
from wan.transformer.model import CausalWanModel, TeaCacheResidual, TextContext, TimeContext


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
            self.usual = Denoising.of(model, settings.schedule, settings.teacache_threshold)
            self.first = self.usual
            if settings.first_schedule is not None:
                self.first = Denoising.of(model, settings.first_schedule, settings.teacache_threshold)
            self.clean = model.encode_time(settings.context_noise)

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

    def acquire_cache(self, geometry: LatentGeometry, batch: int, layout: HeadLayout | None, given: int = 0) -> KVCache:
        """An empty cache in which heads keep what the layout says, or all of them what the policy begins with in a
        video whose first `given` blocks are there already.

        Nobody else has it until it is released.
        """
        if self._spare is not None and self._spare[:2] != (geometry, batch):
            self._spare = None
        policy = self.settings.policy
        initial, until_split = beginning(policy, geometry.frames_per_block, given)
        if self._spare is None:
            return self.model.new_cache(geometry, batch, initial, self.settings.rope_span, layout, until_split)
        cache, self._spare = self._spare[2], None
        if layout is None:
            cache.reset(initial, until_split)
        else:
            cache.allocate(layout)
        return cache

    def release_cache(self, cache: KVCache, geometry: LatentGeometry, batch: int) -> None:
        """Let the next video have the cache."""
        self._spare = geometry, batch, cache

    @cached_property
    def output_grams(self) -> list[Tensor]:
        """See pipeline.runtime.output_weights, with the gates of the usual steps; of the heads that this process has
        until they part."""
        own = own_share(self.model.config.num_heads, self.model.exchange)
        grams = output_grams(self.model, gates_of(self.usual.steps))
        return [gram[own.start : own.stop] for gram in grams]

    def drop_spare_cache(self) -> None:
        """Free the cache that waits for the next video, and with it what was captured over it."""
        self._spare = None


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
        self._prompted: Segment | None = None
        self._live = live
        self.keep_past = live  # clean frames, for prompts to come
        self._noise = noise
        self._profiler = profiler
        whole = geometry.frames_per_block
        self._prefix_latents = deque() if prefix_latents is None else deque(torch.split(prefix_latents, whole, dim=1))
        self._given = len(self._prefix_latents)
        self._moving: dict[int, Tensor] = {}  # by block, latents [B, n, C, h, w] on their way
        self._residual: TeaCacheResidual | None = None
        most = 0 if settings.kv_flush or settings.rolling else settings.window
        self._past: deque[Tensor] = deque(maxlen=most)  # clean frames [B, C, h, w], for prompt switches
        self.record = FlowRecord(0)
        self.forwards = 0  # all of them, of which `skipped` did not run the layers
        self.skipped = 0
        self._batch = batch
        self.cache = generator.acquire_cache(geometry, batch, settings.policy.fixed_layout(), self._given)
        counted = batch if videos is None else videos
        self.parting = Parting(
            settings.policy, geometry.tokens_per_frame, counted, self._given, lambda: generator.output_grams
        )

    @property
    def roles(self) -> HeadRoles | None:
        """What the heads are by now, if they have roles and these are known."""
        return self.parting.roles

    @property
    def frame_attention(self) -> Tensor | None:
        """[layers, heads, 3]: what observed roles follow from, see `Outcome`."""
        return self.parting.frame_attention

    @property
    def _passes(self) -> Passes:
        """Graphs captured over a layout that goes after a block or two would cost more than they save; what a rolling
        window sees follows from more than the layout."""
        return self._model if self.parting.pending or self._settings.rolling else self._generator.passes

    def prompt(self, text: TextContext, cut: bool = False) -> None:
        """Let a prompt take effect with the next block that begins, as a segment that starts there would, from any
        thread; for videos that were started `live`."""
        assert self._live
        self._prompted = Segment(0, text, cut)

    @torch.inference_mode()
    def blocks(self) -> Generator[CleanBlock, None, None]:
        """Yield every block as soon as it is clean; the clean pass follows when the next block is asked for."""
        try:
            yield from self._blocks()
        finally:
            self._generator.release_cache(self.cache, self._geometry, self._batch)

    def _blocks(self) -> Iterator[CleanBlock]:
        size = self._geometry.frames_per_block
        for one in self._rounds():
            start = one.block * size
            with self._profiler.span("denoise"):
                x0 = self._finish(one)
            yield CleanBlock(one.block, start, x0)
            if start + size != self._geometry.num_frames or self.record.limit:
                self.clean_pass(x0, self.text, start, one.block)
                if self._pending or self.keep_past:
                    self._past.extend(x0.unbind(1))

    def _rounds(self) -> Iterator[Round]:
        blocks, usual = self._geometry.num_blocks, len(self._generator.usual.schedule)
        if self._settings.rolling is not None:
            return rolling(blocks, usual)
        return one_by_one(blocks, self._given, len(self._denoising(self._given).schedule), usual)

    def _denoising(self, block: int) -> Denoising:
        """The schedule of a block."""
        first = block == self._given and not (block and self._settings.first_at_zero)
        return self._generator.first if first else self._generator.usual

    @property
    def text(self) -> TextContext:
        """The prompt of the block at work."""
        assert self._text is not None, "a video begins with a prompt"
        return self._text

    def _finish(self, one: Round) -> Tensor:
        """The clean latents [B, n, C, h, w] of a block: those that were given, or what its passes lead to."""
        if one.block < self._given:
            self._enter(one.block)
            return self._prefix_latents.popleft()
        for window in one.windows:
            if window.entering is not None:
                self._enter(window.entering)
            self._pass(window)
        return self._moving.pop(one.block)

    def denoise(self, text: TextContext, block: int) -> Tensor:
        """The clean latents of a block that takes its steps alone, over whatever the cache holds; for measurements."""
        self._text = text
        for step in range(len(self._denoising(block).schedule)):
            self._pass(Window(block, (step,)))
        return self._moving.pop(block)

    def _enter(self, block: int) -> None:
        """Go over to the prompt that is due with a block, and prepare the cache for its passes."""
        start, settings, moved = block * self._geometry.frames_per_block, self._settings, 0
        due = self._take_prompt(start)
        if due is not None and block:
            if not settings.kv_flush:
                self._switch(start, block)
            elif due.cut:
                span = settings.rope_span or start
                moved = settings.cut_from - min(start, span - self._geometry.frames_per_block)
        if settings.rolling is None:
            self.cache.begin_pass(start, self._geometry.frames_per_block, moved)

    def _take_prompt(self, start: int) -> Segment | None:
        """Go over to the prompt that is due at frame `start`, if there is one."""
        due, self._prompted = self._prompted, None
        while self._pending and self._pending[0].start_frame <= start:
            due = self._pending.popleft()
        if due is not None:
            self._text = due.text
        return due

    def _draw(self) -> Tensor:
        return to_device(self._noise.normal(self._geometry.block_shape), self._model.device)

    def _pass(self, window: Window) -> None:
        """Take the blocks of a window one step further, a new one from noise."""
        size, denoising = self._geometry.frames_per_block, self._denoising(window.first)
        if window.entering is not None:
            self._moving[window.entering] = self._draw()
            self._residual = None if all(denoising.computed) else TeaCacheResidual()
        blocks = range(window.first, window.first + len(window.steps))
        x = torch.cat([self._moving[block] for block in blocks], dim=1) if blocks[1:] else self._moving[window.first]
        flows = torch.split(self._flow(x, window, denoising), size, dim=1)
        for block, step, flow in zip(blocks, window.steps, flows, strict=True):
            x0 = denoising.schedule.predict_x0(self._moving[block], flow, step)
            if step + 1 == len(denoising.schedule):
                self._moving[block] = x0
                continue
            if self._settings.rolling and block == window.first and self.record.open:
                self._count(self._passes(x0, self._generator.clean, self.text, self.cache, block * size), True)
            self._moving[block] = denoising.schedule.renoise(x0, self._draw(), step + 1)

    def _flow(self, x: Tensor, window: Window, denoising: Denoising) -> Tensor:
        start, step = window.first * self._geometry.frames_per_block, window.steps[0]
        time = denoising.steps[step]
        if self._settings.rolling is not None:
            context, sinks_at = rolling_context(window, self._geometry.frames_per_block, self._settings.rolling)
            self.cache.begin_pass(start, x.shape[1], context=context, sinks_at=sinks_at)
            by_block = [denoising.steps[step] for step in window.steps]
            time = TimeContext.by_frame([time for time in by_block for _ in range(self._geometry.frames_per_block)])
        if compute := denoising.computed[step]:
            with self.parting.watching(self.cache, window.first, clean=False):
                flow = self._passes(x, time, self.text, self.cache, start, residual=self._residual)
        else:
            assert self._residual is not None
            flow = self._model.skip_layers(x, time, self._residual)
        self._count(flow, compute)
        return flow

    def clean_pass(self, x0: Tensor, text: TextContext, start: int, index: int) -> None:
        """Let the block's keys and values join the cache; let heads part if it is the time.

        The first step of the next block could share this pass, at the price of a loop that knows two blocks at once;
        `python -m benchmarks.merged` measures the most that it could save.
        """
        if self._settings.rolling is not None:
            seen = range(max(0, start + x0.shape[1] - self._settings.rolling), start)
            self.cache.begin_pass(start, x0.shape[1], context=seen, sinks_at=0)
        due = self.parting.is_due(index)
        with self._profiler.span("clean"), self.parting.watching(self.cache, index, clean=True):
            self._encode(x0, text, start, join=not due)
        if due:
            stop = start + x0.shape[1]
            current = range(0) if stop == self._geometry.num_frames else range(start, stop)
            self.cache.split(self.parting.layout(self.cache.all_heads), current)

    def _switch(self, start: int, index: int) -> None:
        """Re-encode the last clean frames under a new prompt, in one pass in which they all see each other.

        The pass is at `context_noise`, as those are that it stands for. Roles that are to be observed again take the
        sinks with them, since afterwards only some heads have any.
        """
        observe_again = self._settings.reclassify_on_switch and self.parting.again(index)
        if observe_again:
            self.cache.reset(self._settings.policy.initial, start)  # heads are split again after this block
        window = self._settings.window or start
        keep_sinks = self._settings.global_sink and window < start and not observe_again
        count = min(window, start)
        if keep_sinks:
            count -= self._settings.policy.window_sinks
        first = start - count
        self.cache.forget(keep_sinks_before=first if keep_sinks else 0)
        if count:
            self.cache.begin_pass(first, count)
            self._encode(torch.stack(list(self._past)[-count:], dim=1), self.text, first)

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
            rotation = self._model.rotation(latents, start + self.cache.moved)
            self._model.encode(latents, clean, text, self.cache, rotation)
        self.forwards += 1

    def _count(self, flow: Tensor, computed: bool) -> None:
        self.record.add(flow)
        self.forwards += 1
        self.skipped += not computed
