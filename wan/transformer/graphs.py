"""Passes that are recorded once and replayed (CUDA graphs): no Python, and no gaps between kernels.

A recording works on the same addresses every time. What differs from pass to pass of a kind (latents, timestep,
positions, prompt) is copied into static inputs first, so that one recording serves all steps, blocks and prompts. What
else decides which kernels run on which addresses is known on the host, `KVCache.buffer_epoch` and `KVCache.state`: a
pass is recorded once for each. Which slots a block moves into afterwards changes from block to block, so those few
copies stay outside. The first pass in a state runs as it is and is recorded then; it warms up whatever must not happen
in a recording (compilation, choice of kernels). Recordings go when the buffers go that they work on, and beyond
`MOST_RECORDINGS` passes run without.

This file knows neither policies nor the loop; how a device records is behind `Recorder`.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wan.attention.cache import KVCache
from wan.attention.head_group import BufferEpoch, CacheState
from wan.attention.rope import Rotation
from wan.cuda_graphs import Recorder, Replay
from wan.transformer.model import CausalWanModel, TeaCacheResidual, TextContext, TimeContext

logger = logging.getLogger(__name__)

MOST_GRAPHS = 64  # at once; a window or packed heads need 10 or fewer, full history two a block


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
class _Captured:
    """What there is over one layout."""

    inputs: StaticInputs
    replays: dict[_Pass, tuple[Replay, _Outputs]] = field(default_factory=dict)


class GraphedPasses:
    """Runs a model's passes in the loop: the same calls, the same results, from recordings where there are any.

    Passes that occur once in a video (re-encoding, observation) go to the model itself.
    """

    def __init__(
        self, model: CausalWanModel, recorder: Recorder, most: int = MOST_GRAPHS, required: bool = True
    ) -> None:
        """`required`: what cannot be recorded is an error, not a warning after which passes run without."""
        self._model = model
        self._recorder = recorder
        self._most = most
        self._required = required
        self._told = False  # that no more fit
        self._captured: weakref.WeakKeyDictionary[BufferEpoch, _Captured] = weakref.WeakKeyDictionary()
        self.captures = 0  # recordings made so far

    @property
    def num_graphs(self) -> int:
        """Recordings there are now."""
        return sum(len(captured.replays) for captured in self._captured.values())

    @torch.inference_mode()  # so that static inputs, made within, are what the model's own inputs are to a compiler
    def __call__(
        self,
        latents: Tensor,
        time: TimeContext,
        text: TextContext,
        cache: KVCache,
        start_frame: int,
        commit: bool = False,
        residual: TeaCacheResidual | None = None,
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

    @torch.inference_mode()
    def commit(self, latents: Tensor, time: TimeContext, text: TextContext, cache: KVCache, start_frame: int) -> None:
        """`CausalWanModel.commit`."""
        if self._run("encode", latents, time, text, cache, start_frame) is None:
            self._model.commit(latents, time, text, cache, start_frame)
        else:
            cache.append_current_block(range(start_frame, start_frame + latents.shape[1]))

    def _run(
        self, kind: str, latents: Tensor, time: TimeContext, text: TextContext, cache: KVCache, start_frame: int
    ) -> _Outputs | None:
        """Replay the pass, or run and record it; None, and nothing done, if the model has to run it."""
        if latents.shape[1] != cache.frames_per_block or cache.observing:
            return None
        captured = self._captured.get(cache.buffer_epoch)
        which = _Pass(kind, cache.state)
        known = captured is not None and which in captured.replays
        if not known and not self._room():
            return None
        rotation = self._model.rotation(latents, start_frame + cache.moved)
        if captured is None:
            captured = self._captured[cache.buffer_epoch] = _Captured(StaticInputs(latents, time, text, rotation))
        captured.inputs.load(latents, time, text, rotation)
        if not known:
            return self._record(which, captured, cache)
        replay, outputs = captured.replays[which]
        replay()
        return outputs

    def _room(self) -> bool:
        full = self.num_graphs >= self._most
        if full and not self._told:
            logger.info("engine: %d passes are recorded, the most at once; others run without", self._most)
            self._told = True
        return not full

    def _record(self, which: _Pass, captured: _Captured, cache: KVCache) -> _Outputs:
        outputs = self._outputs(which.kind, captured.inputs.latents)

        def run() -> None:
            self._compute(captured.inputs, outputs, cache)

        self._recorder.warm_up(run)
        try:
            captured.replays[which] = self._recorder.record(run), outputs
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
        added = TeaCacheResidual() if outputs.residual is not None else None
        outputs.flow.copy_(self._model.flow(*given, residual=added))
        if added is not None and added.value is not None and outputs.residual is not None:
            outputs.residual.copy_(added.value)
