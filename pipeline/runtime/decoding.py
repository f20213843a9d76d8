"""From blocks of latents to frames on the host: decoded, as bytes, cropped, and copied without stopping the device.

With `DecodeStrategy.aside`, on a CUDA device, this goes to a stream of its own, so that the next block is denoised
meanwhile; the host only queues it and goes on. This file does not know how latents are made nor where the frames go.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.runtime.engine import or_eager
from utils.profiler import Profiler
from utils.transfer import SideStream, has_streams, host_memory
from utils.video import to_uint8
from wan.cuda_graphs import CudaRecorder
from wan.vae.layers import run
from wan.vae.streaming import LatentDecoder
from wan.vae.tiles import gather_tiles
from wan.vae.untiled import compiled_run


@dataclass(frozen=True)
class DecodeStrategy:
    """How videos are decoded: `tile`, `frames` (a call), `piece` and `on_host` as in LatentDecoder.decoder, and whether
    a block is decoded beside the denoising of the next, which takes the memory of both at once. `dealt`: tiles are
    dealt to the processes that make a video together, else the first one decodes all."""

    frames: int = 1
    tile: int | None = None
    frame_chunk: int | None = None
    on_side_stream: bool = False
    on_host: bool = False
    dealt: bool = False

    @property
    def steady(self) -> bool:
        """Whether all calls but a video's first are alike, so that they can be compiled and captured."""
        return self.tile is None and self.frame_chunk is None and not self.on_host

    def __str__(self) -> str:
        frames = "whole frames" if self.tile is None else f"in tiles of at most {self.tile} pixels a side"
        cache = ", the cache in the host's memory" if self.on_host else ""
        dealt = ", which are dealt to all processes" if self.dealt else ""
        return frames + dealt + cache + (", beside the next block's denoising" if self.on_side_stream else "")


@dataclass(frozen=True)
class HostFrames:
    """uint8 [B, frames, H, W, 3] on the host, complete once `wait` has returned."""

    frames: Tensor
    ready: torch.cuda.Event | None = None

    def wait(self) -> Tensor:
        if self.ready is not None:
            self.ready.synchronize()
        return self.frames


class BlockDecoder:
    """Decodes the blocks of one video, or of several at once, in order. Close it when the last is done."""

    def __init__(
        self,
        vae: LatentDecoder,
        pixel_size: tuple[int, int],
        profiler: Profiler,
        strategy: DecodeStrategy,
        videos: int | None = None,
    ) -> None:
        """`pixel_size` (height, width) is what is kept of a frame; of a batch the first `videos` are."""
        self._vae = vae
        self._videos = videos
        self._height, self._width = pixel_size
        self._profiler = profiler
        self._tile = strategy.tile
        self._decoder = vae.decoder(strategy.frames, strategy.tile, strategy.frame_chunk, strategy.on_host)
        aside = strategy.on_side_stream and has_streams(vae.device)
        self._stream: SideStream | None = vae.side_stream() if aside else None

    def decode(self, latents: Tensor) -> HostFrames:
        """The next latents [B, F, C, h, w], of any device."""
        with nullcontext() if self._stream is None else self._stream.after(latents):
            frames = self._decoded(latents)
            with self._profiler.span("copy", self._vae.device):
                return self._to_host(frames)

    def assist(self, latents: Tensor) -> None:
        """Decode this process's tiles of the next latents, for the first one, which gathers them."""
        self._decoded(latents)

    def _decoded(self, latents: Tensor) -> Tensor:
        """uint8 [B, frames, H, W, 3] on the device; where tiles are dealt, all of them on the first process."""
        with self._profiler.span("decode", self._vae.device):
            video = self._decoder.decode(latents)
            height, width = video.shape[-2:]
            video = video[: self._videos, ..., : self._height, : self._width]
            frames = torch.stack([to_uint8(one) for one in video])
            if self._vae.exchange is not None and self._tile is not None:
                gather_tiles(self._vae.exchange, frames, height, width, self._tile)
            return frames

    def _to_host(self, frames: Tensor) -> HostFrames:
        if not has_streams(frames.device):
            return HostFrames(frames.cpu())
        host = host_memory(frames.shape, frames.dtype)
        host.copy_(frames, non_blocking=True)
        # Blocking: whoever waits for it sleeps, where by default a core would ask again and again.
        ready = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call,unused-ignore]
        ready.record(torch.cuda.current_stream(frames.device))
        return HostFrames(host, ready)

    def close(self) -> None:
        """Leave the decoder's memory to the next video."""
        self._decoder.close()

    def forget(self) -> None:
        """Free what closed decoders have left for the next video."""
        self._vae.forget()


def fastest_strategy(device: torch.device, block: int, overlap: bool) -> DecodeStrategy:
    """All latent frames of a block at once, but on a CPU, where it gains nothing, one."""
    cpu = device.type == "cpu"
    return DecodeStrategy(1 if cpu else block, on_side_stream=overlap and not cpu)


def start_decoder(
    vae: LatentDecoder, engine: str, required: bool, latents: Tensor, on_side_stream: bool = True
) -> None:
    """Compile and record the decoder for blocks like `latents` [B, F, C, h, w], before the first video, for an engine
    that is not eager, and for the stream on which videos are decoded. For CUDA devices: on a CPU nearly all of the time
    goes to convolutions, which stay as they are.

    An engine that does not run here gives way to eager with a warning, or, if `required`, raises InputError.
    """
    if vae.device.type != "cuda" or engine == "eager":
        return
    frames = latents.shape[1]
    compiled, recorded = engine != "recorded", engine != "compiled"

    def make_ready() -> None:
        vae.prepare(frames, compiled_run() if compiled else run, CudaRecorder(vae.device) if recorded else None)
        warmup_decoder(vae, latents, on_side_stream)
        torch.cuda.empty_cache()  # what calls took that from now on are replayed, in memory of their own

    or_eager("engine of the VAE", engine, required, make_ready, lambda: vae.prepare(frames, run))


def warmup_decoder(vae: LatentDecoder, latents: Tensor, on_side_stream: bool = True) -> None:
    """Decode until calls repeat themselves: a beginning, a steady block, and that once more."""
    size = [side * vae.spatial_scale for side in latents.shape[3:]]
    strategy = DecodeStrategy(latents.shape[1], on_side_stream=on_side_stream)
    decoder = BlockDecoder(vae, (size[0], size[1]), Profiler(vae.device), strategy)
    for _ in range(3):
        decoder.decode(latents).wait()
    decoder.close()
