"""Latents to video as the frames come: one decoder a video, which keeps what its layers remember in between.

So several videos can be decoded at once, and a video's frames never stand in memory together. `LatentDecoder` is what
all decoders of latents have in common, whatever their layers are: the weights, the frames that closed decoders have
left, and how calls are run. This file knows no layers, nor how latents are made and how video is written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from utils.errors import InputError
from utils.pinned_buffers import PinnedBuffers
from utils.transfer import SideStream, has_streams
from wan.attention.exchange import HeadExchange
from wan.vae.untiled import FrameDecoder, Run, Steady

if TYPE_CHECKING:
    from wan.cuda_graphs import Recorder

GPU_FRAME_CHUNK = (
    4  # pixel frames that the last levels work on at once: those of one latent frame, enough to fill a GPU
)

Self = TypeVar("Self", bound="LatentDecoder")


class LatentDecoder(ABC):
    """What decodes normalised latents.

    `z_dim` latent channels (16); one latent pixel is `spatial_scale` (8) pixels wide and high; a latent frame is
    `temporal_scale` (4) pixel frames, except the first of a video, which is 1. `tiles` says whether frames can be
    decoded in tiles.
    """

    tiles = False

    def __init__(self, module: nn.Module, z_dim: int, spatial_scale: int, temporal_scale: int) -> None:
        self.module = module.eval()
        self.z_dim = z_dim
        self.spatial_scale = spatial_scale
        self.temporal_scale = temporal_scale
        self.exchange: HeadExchange | None = None
        """The other processes to which tiles are dealt, if they are."""
        self._steady: Steady | None = None
        self._spare: tuple[tuple[int, ...], FrameDecoder] | None = None
        self._stream: SideStream | None = None
        self.lay_out_for(self.device)

    @abstractmethod
    def prepared(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, F, z_dim, h, w] on this device as the layers take them: [B, z_dim, F, h, w]."""

    @abstractmethod
    def new_frames(self, tile: int | None, frame_chunk: int, host: PinnedBuffers | None) -> FrameDecoder:
        """For a video; `tile` and `frame_chunk` as in StreamingDecoder, `host` as in FeatureCache."""

    @abstractmethod
    def lay_out(self, conv3d_as_conv2d: bool) -> None:
        """Put the weights in memory as they are used best; `conv3d_as_conv2d`: by a CPU."""

    def operations(self, height: int, width: int, tile: int, ranks: int) -> list[float]:
        """What each of so many processes computes of a latent frame, if tiles are dealt to them."""
        raise NotImplementedError("this decoder has no tiles")

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype, which is the video's."""
        return self._parameter().dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self._parameter().device

    def _parameter(self) -> Tensor:
        return next(self.module.parameters())

    def to(self: Self, device: torch.device | str) -> Self:
        """Move the parameters; live decoders keep their cache where it is, so move between videos."""
        self.module.to(device)
        self._stream, self._spare = None, None  # of another device
        return self.lay_out_for(self.device)

    def lay_out_for(self: Self, device: torch.device) -> Self:
        """Compute as is best on `device`; on the meta device, to find out what it takes there."""
        self.lay_out(conv3d_as_conv2d=device.type == "cpu")
        self.frame_chunk = 1 if device.type == "cpu" else GPU_FRAME_CHUNK
        return self

    def prepare(self, frames: int, step: Run, recorder: Recorder | None = None) -> None:
        """From now on decoders run calls of `frames` latent frames through `step`, see `compiled_run`, and from
        recordings; not a video's first call, not with tiles, whose sizes vary, and not with the cache on the host."""
        self._steady = Steady(frames, step, recorder)
        self._spare = None

    def pixel_frames(self, latent_frames: int) -> int:
        """The length in pixel frames of a video of `latent_frames` (at least 1): 21 -> 81."""
        return 1 + self.temporal_scale * (latent_frames - 1)

    def decoder(
        self, frames_per_call: int = 1, tile: int | None = None, frame_chunk: int | None = None, on_host: bool = False
    ) -> StreamingDecoder:
        """A decoder for one video (or one batch of videos); see StreamingDecoder. `frame_chunk`: None for what is
        fastest."""
        return StreamingDecoder(
            self, frames_per_call, tile, self.frame_chunk if frame_chunk is None else frame_chunk, on_host
        )

    def side_stream(self) -> SideStream:
        """The one stream beside the current one on which this decodes, so that what a decoder leaves behind is used
        again on the same stream."""
        if self._stream is None:
            self._stream = SideStream(self.device)
        return self._stream

    def acquire(self, key: tuple[int, ...], tile: int | None, frame_chunk: int, on_host: bool = False) -> FrameDecoder:
        """A new FrameDecoder, or one that was given back under the same key: what its sizes depend on, and the stream
        on which it is used."""
        spare, self._spare = self._spare, None
        if spare is not None and spare[0] == key:
            spare[1].clear()
            return spare[1]
        host = PinnedBuffers(page_locked=self.device.type == "cuda") if on_host else None
        return self.new_frames(tile, frame_chunk, host)

    def current_stream(self) -> int:
        """The CUDA stream on which work for this device is queued now; 0 on other devices. PyTorch's allocator gives
        memory again to the stream on which it was made, so what is kept is used on that one alone."""
        return torch.cuda.current_stream(self.device).cuda_stream if has_streams(self.device) else 0

    def forget(self) -> None:
        """Free what closed decoders have left for the next video."""
        self._spare = None

    def release(self, key: tuple[int, ...], frames: FrameDecoder) -> None:
        """Let the next video have it, with its memory and its recording."""
        self._spare = key, frames


class StreamingDecoder:
    """Decodes one video's latent frames in order, any number at a time; the cache in between is bounded.

    With `frames_per_call` 1 latent frames go through the layers one by one, and the pixels do not depend on how the
    video was cut into calls of `decode`. With more, later frames go several at a time: larger kernels and fewer of
    them, and pixels that may differ in their last bits. The first latent frame always goes alone.

    With `tile`, for a decoder that has `tiles`, the last levels run in tiles of at most `tile` output pixels a side (a
    multiple of 16): less memory for activations, some of the work twice, the pixels apart by float rounding alone; see
    wan.vae.tiles. The last levels work on `frame_chunk` pixel frames at once: fewer take less memory.
    With `on_host` what is kept for the next frames lies in the host's memory, which takes time to copy and changes
    nothing in the pixels.
    """

    def __init__(
        self, source: LatentDecoder, frames_per_call: int, tile: int | None, frame_chunk: int, on_host: bool = False
    ) -> None:
        if frames_per_call < 1:
            raise InputError(f"frames_per_call is {frames_per_call}; at least 1 latent frame a call is needed.")
        assert tile is None or source.tiles, "this decoder has no tiles"
        self._source = source
        self._frames_per_call = frames_per_call
        self._tile = tile
        self._frame_chunk = frame_chunk
        self._on_host = on_host
        self._key: tuple[int, ...] = ()
        self._frames: FrameDecoder | None = None
        self._started = False

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The next latent frames [B, F, z_dim, h, w], normalised, to video [B, frames, 3, H, W] in [-1, 1].

        frames is 4·F, or 1 + 4·(F - 1) for the first frames of a video. The video has the weights' dtype and device.
        """
        source = self._source
        assert latents.ndim == 5, "latents are [B, F, z_dim, h, w]"
        assert latents.shape[1] > 0, "at least one latent frame is needed"
        z = source.prepared(latents.to(source.device))
        video = self._empty_video(latents)
        if self._frames is None:
            assert not self._started, "the decoder is closed"
            sizes = latents.shape[0], *latents.shape[3:], self._tile or 0, self._frame_chunk, self._on_host
            self._key = *sizes, source.current_stream()
            self._frames = source.acquire(self._key, self._tile, self._frame_chunk, self._on_host)
        done = 0
        for start, stop in self._calls(latents.shape[1]):
            frames = (stop - start) * source.temporal_scale if self._started else 1
            self._frames.decode(z[:, :, start:stop], video[:, done : done + frames])
            self._started = True
            done += frames
        assert done == video.shape[1], f"{done} of {video.shape[1]} frames were decoded"
        return video

    def _empty_video(self, latents: Tensor) -> Tensor:
        source = self._source
        batch, frames, _, height, width = latents.shape
        total = frames * source.temporal_scale if self._started else source.pixel_frames(frames)
        shape = (batch, total, 3, height * source.spatial_scale, width * source.spatial_scale)
        return torch.empty(shape, dtype=source.dtype, device=source.device)

    def _calls(self, frames: int) -> list[tuple[int, int]]:
        first = 0 if self._started else 1
        starts = range(first, frames, self._frames_per_call)
        later = [(i, min(i + self._frames_per_call, frames)) for i in starts]
        return later if self._started else [(0, 1), *later]

    def cache_bytes(self) -> int:
        """Bytes that are kept for the next frames, wherever; constant from the first latent frame on."""
        return 0 if self._frames is None else self._frames.cache_bytes()

    def close(self) -> None:
        """The video is done: leave the memory to the next one. Nothing can be decoded any more."""
        if self._frames is not None:
            self._source.release(self._key, self._frames)
            self._frames = None
