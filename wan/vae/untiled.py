"""Latent frames of a video through a decoder's layers, on whole frames: what the frames before leave stays in between.

What takes memory are the last levels, so they run a few pixel frames at a time, which changes nothing, since the layers
remember the frames before. This file knows no layers, and neither how latents are normalised nor how the frames of a
video are cut into calls.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from utils.compiled import compiled_by_size
from utils.pinned_buffers import PinnedBuffers
from wan.vae.feature_cache import FeatureCache
from wan.vae.layers import run

if TYPE_CHECKING:
    from wan.cuda_graphs import Recorder, Replay

Run = Callable[[Sequence[nn.Module], Tensor, FeatureCache], Tensor]


class FrameDecoder(Protocol):
    """Decodes a video's latent frames in order and keeps what the next ones need."""

    def decode(self, z: Tensor, video: Tensor) -> None:
        """What the layers take, [B, z_dim, F, h, w], into `video` [B, frames, 3, H, W], clamped to [-1, 1]."""

    def cache_bytes(self) -> int:
        """Bytes kept for the next frames."""

    def clear(self) -> None:
        """Be ready for another video of the same size, in the same memory."""


@dataclass(frozen=True)
class Steady:
    """How calls of `frames` latent frames that do not begin a video are run: the layers through `run`, compiled for
    instance, and the whole call from a recording if there is a `recorder`."""

    frames: int
    run: Run = run
    recorder: Recorder | None = None


@dataclass(frozen=True)
class DecoderStage:
    """Consecutive layers, and how many frames enter them at once; None: all that there are."""

    layers: Sequence[nn.Module]
    frames: int | None = None


class UntiledDecoder:
    """A FrameDecoder that runs `parts` one after the other. The first `lead` frames that they make are left out."""

    def __init__(
        self,
        parts: Sequence[DecoderStage],
        steady: Steady | None = None,
        lead: int = 0,
        host: PinnedBuffers | None = None,
    ) -> None:
        """`host`: as in FeatureCache, and never together with `steady`."""
        assert steady is None or host is None
        self._parts = parts
        self._histories = [FeatureCache(host) for _ in parts]
        self._steady = steady
        self._lead = lead
        self._recorded: tuple[Tensor, Tensor, Replay] | None = None  # its input, its output, and how to repeat it

    def decode(self, z: Tensor, video: Tensor) -> None:
        steady = self._steady
        if self._first or steady is None or z.shape[2] != steady.frames:
            self._decode(z, video, run)
        elif steady.recorder is None:
            self._decode(z, video, steady.run)
        else:
            self._replay(z, video, steady.run, steady.recorder)

    @property
    def _first(self) -> bool:
        return self._histories[0].first

    def _replay(self, z: Tensor, video: Tensor, step: Run, recorder: Recorder) -> None:
        """`_decode` from its recording, which is made the first time."""
        if self._recorded is None:
            with torch.inference_mode(False):  # as the layers' memory
                given, made = torch.empty_like(z), torch.empty_like(video)
            given.copy_(z)
            recorder.warm_up(lambda: self._decode(given, made, step))
            video.copy_(made)
            self._recorded = given, made, recorder.record(lambda: self._decode(given, made, step))
            return
        given, made, replay = self._recorded
        given.copy_(z)
        replay()
        video.copy_(made)

    def _decode(self, z: Tensor, video: Tensor, step: Run) -> None:
        done = -self._lead if self._first else 0  # below 0: frames that are left out
        for pixels in self._pixels(step, z, 0):
            frames = pixels.transpose(1, 2)[:, max(-done, 0) :]
            begin = max(done, 0)
            torch.clamp(frames, -1.0, 1.0, out=video[:, begin : begin + frames.shape[1]])
            done += pixels.shape[2]

    def _pixels(self, step: Run, x: Tensor, index: int) -> Iterator[Tensor]:
        """What the parts from this one on make of x, in pieces."""
        if index == len(self._parts):
            yield x
            return
        part = self._parts[index]
        for frame_chunk in torch.split(x, part.frames or x.shape[2], dim=2):
            yield from self._pixels(step, step(part.layers, frame_chunk, self._histories[index]), index + 1)

    def cache_bytes(self) -> int:
        return sum(history.nbytes() for history in self._histories)

    def clear(self) -> None:
        for history in self._histories:
            history.clear()


def compiled_run(backend: str = "inductor") -> Run:
    """`wan.vae.layers.run` through torch.compile, once for every stage and size."""

    def size(layers: Sequence[nn.Module], x: Tensor, history: FeatureCache) -> Hashable:
        return layers[0], x.shape, x.dtype, x.is_inference()

    return compiled_by_size(run, size, backend)
