"""The VAE: latents to video and back, in one piece or as the frames come.

This file loads the layers (wan.vae_layers, wan.vae_modules) from either published layout, normalises latents, and has
one decoder a video, which keeps what the causal convolutions remember, so that several videos can be decoded at once
and a video's frames never stand in memory together. It does not know how latents are made nor how video is written.

Source: Wan 2.1 (arXiv 2503.20314), section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from utils.errors import InputError
from utils.host_memory import HostMemory
from wan.checkpoint import load_into, read_json, read_tensors, stripped_tensors
from wan.vae_history import History
from wan.vae_layers import run
from wan.vae_modules import VAEConfig, VAEModule
from wan.vae_names import to_diffusers
from wan.vae_tiles import FrameDecoder, Run, Steady, TiledFrames, WholeFrames, check_tile

if TYPE_CHECKING:
    from wan.graphs import Recorder

GPU_PIECE = 4  # pixel frames that the last levels work on at once: those of one latent frame, enough to fill a GPU
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"


class VAE:
    """Wan's causal video VAE with normalised latents.

    `z_dim` latent channels (16); one latent pixel is `spatial_scale` (8) pixels wide and high; a latent frame is
    `temporal_scale` (4) pixel frames, except the first of a video, which is 1.
    """

    def __init__(self, module: VAEModule, config: VAEConfig) -> None:
        self.module = module.eval()
        self.config = config
        self.z_dim = config.z_dim
        self.spatial_scale: int = 2 ** (len(config.dim_mult) - 1)
        self.temporal_scale: int = 2 ** sum(config.temperal_downsample)
        self._mean = self._per_channel(config.latents_mean)
        self._std = self._per_channel(config.latents_std)
        self._steady: Steady | None = None
        self._spare: tuple[tuple[int, ...], FrameDecoder] | None = None
        self._stream: torch.cuda.Stream | None = None
        self.lay_out_for(self.device)

    def _per_channel(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device).view(1, 1, -1, 1, 1)

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype, device: torch.device | str) -> VAE:
        """From Wan2.1_VAE.pth, or from a Diffusers `vae/` folder. Raises InputError."""
        if not path.is_dir():
            return cls.from_state(stripped_tensors(read_tensors(path), path), None, dtype, device, path)
        index = path / f"{DIFFUSERS_WEIGHTS}.index.json"
        weights = index if index.is_file() else path / DIFFUSERS_WEIGHTS
        state = stripped_tensors(read_tensors(weights), weights)
        return cls.from_state(state, read_json(path / "config.json"), dtype, device, weights)

    @classmethod
    def from_state(
        cls,
        state: Mapping[str, Tensor],
        config: Mapping[str, object] | None,
        dtype: torch.dtype,
        device: torch.device | str,
        source: Path = Path("the VAE's state"),
    ) -> VAE:
        """From tensors under Wan's or Diffusers' names.

        `config` is Diffusers' configuration; without it the sizes are read off the shapes and the latents' mean and
        standard deviation are Wan 2.1's. Raises InputError when names or shapes do not fit.
        """
        state = to_diffusers(state)
        sizes = VAEConfig.of_state(state, source) if config is None else VAEConfig.from_mapping(config, source)
        module = _build(sizes)
        load_into(module, state, source, dtype, device)
        return cls(module, sizes)

    @classmethod
    def published(cls, dtype: torch.dtype) -> VAE:
        """Wan 2.1's sizes on the meta device, without weights: to find out what it takes."""
        return cls(_build(VAEConfig()).to(dtype), VAEConfig())

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

    def to(self, device: torch.device | str) -> VAE:
        """Move the parameters; live decoders keep their cache where it is, so move between videos."""
        self.module.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self.lay_out_for(self.device)

    def lay_out_for(self, device: torch.device) -> VAE:
        """Compute as is best on `device`; on the meta device, to find out what it takes there."""
        self.module.lay_out(planes=device.type == "cpu")
        self.piece = 1 if device.type == "cpu" else GPU_PIECE
        return self

    def prepare(self, frames: int, step: Run, recorder: Recorder | None = None) -> None:
        """From now on decoders run calls of `frames` latent frames through `step`, see `compiled_run`, and from
        recordings; not a video's first call, not with tiles, whose sizes vary, and not with the cache on the host."""
        self._steady = Steady(frames, step, recorder)
        self._spare = None

    def pixel_frames(self, latent_frames: int) -> int:
        """The length in pixel frames of a video of `latent_frames` (at least 1): 21 -> 81."""
        return 1 + self.temporal_scale * (latent_frames - 1)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Video [B, frames, 3, H, W] in [-1, 1] to normalised float32 latents [B, F, z_dim, h, w]: the mean.

        Raises InputError unless frames = 1 + 4·k and H, W are multiples of 8.
        """
        self._check_video(video)
        layers, history = self.module.encoder.layers(), History()
        pixels = video.to(self.device, self.dtype).transpose(1, 2)
        starts = range(1, pixels.shape[2], self.temporal_scale)
        chunks = [pixels[:, :, :1], *(pixels[:, :, i : i + self.temporal_scale] for i in starts)]
        features = [run(layers, chunk, history) for chunk in chunks]
        moments = self.module.quant_conv(torch.cat(features, dim=2))  # [B, 2 z_dim, F, h, w]: means, log variances
        return self.normalize(moments[:, : self.z_dim].transpose(1, 2))

    def _check_video(self, video: Tensor) -> None:
        frames, channels, height, width = video.shape[1:]
        if frames < 1 or (frames - 1) % self.temporal_scale:
            kept = max(1, frames - (frames - 1) % self.temporal_scale)
            raise InputError(
                f"a video of {frames} frames cannot be encoded: the number must be 1 + {self.temporal_scale}·k; "
                f"make it {kept}."
            )
        if channels != 3 or height % self.spatial_scale or width % self.spatial_scale:
            raise InputError(
                f"a video of {channels} channels, {height} x {width}, cannot be encoded: 3 channels and multiples of "
                f"{self.spatial_scale} are wanted."
            )

    def normalize(self, z: Tensor) -> Tensor:
        """(z - mean) / std in float32, [B, F, z_dim, h, w]."""
        return (z.float() - self._mean.to(z.device)) / self._std.to(z.device)

    def denormalize(self, latents: Tensor) -> Tensor:
        """latents · std + mean in float32, [B, F, z_dim, h, w]."""
        return latents.float() * self._std.to(latents.device) + self._mean.to(latents.device)

    def decoder(
        self, frames_per_call: int = 1, tile: int | None = None, piece: int | None = None, on_host: bool = False
    ) -> StreamingDecoder:
        """A decoder for one video (or one batch of videos); see StreamingDecoder. `piece`: None for what is fastest."""
        return StreamingDecoder(self, frames_per_call, tile, self.piece if piece is None else piece, on_host)

    def side_stream(self) -> torch.cuda.Stream:
        """The one CUDA stream beside the current one on which this VAE decodes, so that what a decoder leaves behind is
        used again on the same stream."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call,unused-ignore]
        return self._stream

    def take_frames(self, key: tuple[int, ...], tile: int | None, piece: int, on_host: bool = False) -> FrameDecoder:
        """A new FrameDecoder, or one that was given back under the same key (what its sizes depend on)."""
        spare, self._spare = self._spare, None
        if spare is not None and spare[0] == key:
            spare[1].clear()
            return spare[1]
        decoder = self.module.decoder
        host = HostMemory(page_locked=self.device.type == "cuda") if on_host else None
        if tile is not None:
            return TiledFrames(decoder, tile, piece, host)
        return WholeFrames(decoder, piece, self._steady if host is None else None, host)

    def forget(self) -> None:
        """Free what closed decoders have left for the next video."""
        self._spare = None

    def give_back(self, key: tuple[int, ...], frames: FrameDecoder) -> None:
        """Let the next video have it, with its memory and its recording."""
        self._spare = key, frames


class StreamingDecoder:
    """Decodes one video's latent frames in order, any number at a time; the cache in between is bounded.

    With `frames_per_call` 1 latent frames go through the layers one by one, and the pixels do not depend on how the
    video was cut into calls of `decode`. With more, later frames go several at a time: larger kernels and fewer of
    them, and pixels that may differ in their last bits. The first latent frame always goes alone.

    With `tile`, the last levels run in tiles of at most `tile` output pixels a side (a multiple of 16): less memory for
    activations, some of the work twice, the pixels apart by float rounding alone; see wan.vae_tiles. The last levels
    work on `piece` pixel frames at once: fewer take less memory. With `on_host` what is kept for the next frames lies
    in the host's memory, which takes time to copy and changes nothing in the pixels.
    """

    def __init__(self, vae: VAE, frames_per_call: int, tile: int | None, piece: int, on_host: bool = False) -> None:
        if frames_per_call < 1:
            raise InputError(f"frames_per_call is {frames_per_call}; at least 1 latent frame a call is needed.")
        if tile is not None:
            check_tile(tile)
        self._vae = vae
        self._frames_per_call = frames_per_call
        self._tile = tile
        self._piece = piece
        self._on_host = on_host
        self._key: tuple[int, ...] = ()
        self._frames: FrameDecoder | None = None
        self._started = False

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The next latent frames [B, F, z_dim, h, w], normalised, to video [B, frames, 3, H, W] in [-1, 1].

        frames is 4·F, or 1 + 4·(F - 1) for the first frames of a video. The video has the VAE's dtype and device.
        """
        vae = self._vae
        assert latents.ndim == 5, "latents are [B, F, z_dim, h, w]"
        assert latents.shape[1] > 0, "at least one latent frame is needed"
        z = vae.denormalize(latents.to(vae.device)).to(vae.dtype).transpose(1, 2)
        z = vae.module.post_quant_conv(z)
        video = self._empty_video(latents)
        if self._frames is None:
            assert not self._started, "the decoder is closed"
            self._key = (latents.shape[0], *latents.shape[3:], self._tile or 0, self._piece, self._on_host)
            self._frames = vae.take_frames(self._key, self._tile, self._piece, self._on_host)
        done = 0
        for start, stop in self._calls(latents.shape[1]):
            frames = (stop - start) * vae.temporal_scale if self._started else 1
            self._frames.decode(z[:, :, start:stop], video[:, done : done + frames])
            self._started = True
            done += frames
        assert done == video.shape[1], f"{done} of {video.shape[1]} frames were decoded"
        return video

    def _empty_video(self, latents: Tensor) -> Tensor:
        vae = self._vae
        batch, frames, _, height, width = latents.shape
        total = frames * vae.temporal_scale if self._started else vae.pixel_frames(frames)
        shape = (batch, total, 3, height * vae.spatial_scale, width * vae.spatial_scale)
        return torch.empty(shape, dtype=vae.dtype, device=vae.device)

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
            self._vae.give_back(self._key, self._frames)
            self._frames = None


def _build(config: VAEConfig) -> VAEModule:
    with torch.device("meta"):
        return VAEModule(config)


def compiled_run() -> Run:
    """`wan.vae_layers.run` through torch.compile, whole, once for every size."""
    # torch.compile has graphs of its own, which know nothing of those that are recorded here.
    options: dict[str, str | int | bool | Callable[..., object]] = {"triton.cudagraphs": False}
    return torch.compile(run, fullgraph=True, dynamic=False, options=options)
