"""Passes that are recorded once and replayed (CUDA graphs): no Python, and no gaps between kernels.

A recording works on the same addresses every time. What differs from pass to pass of a kind (latents, timestep,
positions, prompt) is copied into static inputs first, so that one recording serves all steps, blocks and prompts. What
else decides which kernels run on which addresses is known on the host, `KVCache.layout` and `KVCache.state`: a pass is
recorded once for each. Which slots a block moves into afterwards changes from block to block, so those few copies stay
outside. The first pass in a state runs as it is and is recorded then; it warms up whatever must not happen in a
recording (compilation, choice of kernels). Recordings go when the buffers go that they work on, and beyond
`MOST_RECORDINGS` passes run without.

This file knows neither policies nor the loop; how a device records is behind `Recorder`.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from wan.cache import CacheState, KVCache, Layout
from wan.model import CausalWanModel, StackResidual, TextContext, TimeContext
from wan.rope import Rotation

logger = logging.getLogger(__name__)

MOST_RECORDINGS = 64  # at once; a window or packed heads need 10 or fewer, full history two a block

Replay = Callable[[], None]


class Recorder(Protocol):
    """How a device records. Functions given to it work in place on tensors that outlive the recording."""

    def warm_up(self, function: Callable[[], None]) -> None:
        """Run the function once, where it will be recorded."""

    def record(self, function: Callable[[], None]) -> Replay:
        """What repeats the function's work on the device. Raises RuntimeError if it cannot be recorded."""


class CudaRecorder:
    """CUDA graphs, recorded on a stream of their own in one memory pool that they share: they never run at once, and
    leave nothing behind in it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call,unused-ignore]
        self._pool = torch.cuda.graph_pool_handle()
        # A pool must not be used again after its last graph is gone, so there is one that stays.
        one = torch.ones(1, device=device)
        self.warm_up(one.clone)
        self._anchor = self.record(one.clone)

    def warm_up(self, function: Callable[[], object]) -> None:
        with self._aside():
            function()

    def record(self, function: Callable[[], object]) -> Replay:
        try:
            return self._capture(function)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()  # what the allocator keeps for later cannot be had back in a recording
            return self._capture(function)

    def _capture(self, function: Callable[[], object]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        with self._aside(), _no_collection():
            # The mode lets other threads (a decoder, a writer) allocate meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                function()
            except BaseException:
                with suppress(RuntimeError):  # an error that follows from the first, which is the one to tell
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph.replay

    @contextmanager
    def _aside(self) -> Iterator[None]:
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            yield
        here.wait_stream(self._stream)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage may hold graphs and events, which must not be freed during a recording."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class StaticInputs:
    """The tensors that the recordings over one layout read; prompt and positions are copied only when they change."""

    def __init__(self, latents: Tensor, time: TimeContext, text: TextContext, rotation: Rotation) -> None:
        self.latents = torch.empty_like(latents)
        layers, head = torch.empty_like(time.layers), torch.empty_like(time.head)
        self.time = TimeContext(time.timestep, layers, head, time.modulation)
        self.text = TextContext(*(tuple(map(torch.empty_like, part)) for part in (text.keys, text.values)))
        self.rotation = Rotation(torch.empty_like(rotation.cos), torch.empty_like(rotation.sin))
        self._text: Callable[[], TextContext | None] = lambda: None
        self._rotation: Callable[[], Rotation | None] = lambda: None

    def load(self, latents: Tensor, time: TimeContext, text: TextContext, rotation: Rotation) -> None:
        self.latents.copy_(latents)
        self.time.layers.copy_(time.layers)
        self.time.head.copy_(time.head)
        if self._text() is not text:
            torch._foreach_copy_([*self.text.keys, *self.text.values], [*text.keys, *text.values])
            self._text = weakref.ref(text)
        if self._rotation() is not rotation:
            self.rotation.cos.copy_(rotation.cos)
            self.rotation.sin.copy_(rotation.sin)
            self._rotation = weakref.ref(rotation)


@dataclass
class _Outputs:
    """Where a recording leaves its results; a pass gets copies of them."""

    flow: Tensor | None
    residual: Tensor | None


@dataclass(frozen=True)
class _Pass:
    """Which recording a pass needs, among those over one layout."""

    kind: str
    state: CacheState


@dataclass
class _Recorded:
    """What there is over one layout."""

    inputs: StaticInputs
    replays: dict[_Pass, tuple[Replay, _Outputs]] = field(default_factory=dict)


class GraphedPasses:
    """Runs a model's passes in the loop: the same calls, the same results, from recordings where there are any.

    Passes that occur once in a video (re-encoding, observation) go to the model itself.
    """

    def __init__(
        self, model: CausalWanModel, recorder: Recorder, most: int = MOST_RECORDINGS, required: bool = True
    ) -> None:
        """`required`: what cannot be recorded is an error, not a warning after which passes run without."""
        self._model = model
        self._recorder = recorder
        self._most = most
        self._required = required
        self._told = False  # that no more fit
        self._recorded: weakref.WeakKeyDictionary[Layout, _Recorded] = weakref.WeakKeyDictionary()
        self.captures = 0  # recordings made so far

    @property
    def recordings(self) -> int:
        """Recordings there are now."""
        return sum(len(recorded.replays) for recorded in self._recorded.values())

    def __call__(
        self,
        latents: Tensor,
        time: TimeContext,
        text: TextContext,
        cache: KVCache,
        start_frame: int,
        commit: bool = False,
        residual: StackResidual | None = None,
    ) -> Tensor:
        """`CausalWanModel.forward`."""
        kind = "flow" if residual is None else "flow and residual"
        outputs = None if commit else self._run(kind, latents, time, text, cache, start_frame)
        if outputs is None or outputs.flow is None:
            flow: Tensor = self._model(latents, time, text, cache, start_frame, commit, residual)
            return flow
        if residual is not None and outputs.residual is not None:
            residual.value = outputs.residual.clone()
        return outputs.flow.clone()

    def commit(self, latents: Tensor, time: TimeContext, text: TextContext, cache: KVCache, start_frame: int) -> None:
        """`CausalWanModel.commit`."""
        if self._run("encode", latents, time, text, cache, start_frame) is None:
            self._model.commit(latents, time, text, cache, start_frame)
        else:
            cache.commit_own(range(start_frame, start_frame + latents.shape[1]))

    def _run(
        self, kind: str, latents: Tensor, time: TimeContext, text: TextContext, cache: KVCache, start_frame: int
    ) -> _Outputs | None:
        """Replay the pass, or run and record it; None, and nothing done, if the model has to run it."""
        if latents.shape[1] != cache.frames_per_block or cache.observing:
            return None
        recorded = self._recorded.get(cache.layout)
        which = _Pass(kind, cache.state)
        known = recorded is not None and which in recorded.replays
        if not known and not self._room():
            return None
        rotation = self._model.rotation(latents, start_frame)
        if recorded is None:
            recorded = self._recorded[cache.layout] = _Recorded(StaticInputs(latents, time, text, rotation))
        recorded.inputs.load(latents, time, text, rotation)
        if not known:
            return self._record(which, recorded, cache)
        replay, outputs = recorded.replays[which]
        replay()
        return outputs

    def _room(self) -> bool:
        full = self.recordings >= self._most
        if full and not self._told:
            logger.info("engine: %d passes are recorded, the most at once; others run without", self._most)
            self._told = True
        return not full

    def _record(self, which: _Pass, recorded: _Recorded, cache: KVCache) -> _Outputs:
        outputs = self._outputs(which.kind, recorded.inputs.latents)

        def run() -> None:
            self._compute(recorded.inputs, outputs, cache)

        self._recorder.warm_up(run)
        try:
            recorded.replays[which] = self._recorder.record(run), outputs
            self.captures += 1
        except RuntimeError as error:
            if self._required:
                raise
            reason = str(error).splitlines()[0]
            logger.warning("engine: passes run one by one, since the device cannot record them (%s)", reason)
            self._most, self._told = 0, True
        return outputs

    def _outputs(self, kind: str, latents: Tensor) -> _Outputs:
        if kind == "encode":
            return _Outputs(None, None)
        batch, frames, _, height, width = latents.shape
        config, like = self._model.config, latents.new_empty
        _, rows, columns = config.patch_size
        tokens = frames * (height // rows) * (width // columns)
        residual = like(batch, tokens, config.dim, dtype=self._model.dtype) if kind != "flow" else None
        return _Outputs(like(batch, frames, config.out_dim, height, width, dtype=torch.float32), residual)

    def _compute(self, inputs: StaticInputs, outputs: _Outputs, cache: KVCache) -> None:
        """The pass itself, from static inputs to static outputs."""
        given = inputs.latents, inputs.time, inputs.text, cache, inputs.rotation
        if outputs.flow is None:
            self._model.encode(*given)
            return
        added = StackResidual() if outputs.residual is not None else None
        outputs.flow.copy_(self._model.flow(*given, residual=added))
        if added is not None and added.value is not None and outputs.residual is not None:
            outputs.residual.copy_(added.value)
