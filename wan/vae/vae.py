"""The VAE: latents to video (wan.vae.streaming) and back.

This file loads the layers (wan.vae.layers, wan.vae.modules) from either published layout, normalises latents, and says
how the decoder is run. It does not know how latents are made nor how video is written.

Source: Wan 2.1 (arXiv 2503.20314), section 4.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import InputError
from utils.pinned_buffers import PinnedBuffers
from wan.checkpoints.files import read_json, weights_in
from wan.checkpoints.filling import load_into
from wan.checkpoints.reading import read_tensors
from wan.checkpoints.state import VAE_PREFIXES, opened, stripped_tensors
from wan.checkpoints.vae_names import to_diffusers
from wan.vae.feature_cache import FeatureCache
from wan.vae.layers import Upsample, run
from wan.vae.modules import VAEConfig, VAEModule
from wan.vae.streaming import LatentDecoder, StreamingDecoder
from wan.vae.tiles import TiledFrames, check_tile
from wan.vae.untiled import DecoderStage, FrameDecoder, UntiledDecoder


class VAE(LatentDecoder):
    """Wan's causal video VAE with normalised latents."""

    module: VAEModule
    tiles = True

    def __init__(self, module: VAEModule, config: VAEConfig) -> None:
        scales = 2 ** (len(config.dim_mult) - 1), 2 ** sum(config.temperal_downsample)
        super().__init__(module, config.z_dim, *scales)
        self.config = config
        self._mean = self._per_channel(config.latents_mean)
        self._std = self._per_channel(config.latents_std)

    def _per_channel(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device).view(1, 1, -1, 1, 1)

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype, device: torch.device | str) -> VAE:
        """From a file in Wan's or Diffusers' names, or from a Diffusers `vae/` folder. Raises InputError."""
        weights = weights_in(path) if path.is_dir() else path
        config = read_json(path / "config.json") if path.is_dir() else None
        state = stripped_tensors(opened(read_tensors(weights))[1], weights, VAE_PREFIXES)
        return cls.from_state(state, config, dtype, device, weights)

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

    def to(self, device: torch.device | str) -> VAE:
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return super().to(device)

    def lay_out(self, conv3d_as_conv2d: bool) -> None:
        self.module.lay_out(conv3d_as_conv2d)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Video [B, frames, 3, H, W] in [-1, 1] to normalised float32 latents [B, F, z_dim, h, w]: the mean.

        Raises InputError unless frames = 1 + 4·k and H, W are multiples of 8.
        """
        self._check_video(video)
        layers, history = self.module.encoder.layers(), FeatureCache()
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
        self, frames_per_call: int = 1, tile: int | None = None, frame_chunk: int | None = None, on_host: bool = False
    ) -> StreamingDecoder:
        """As LatentDecoder.decoder. Raises InputError for a `tile` that is no positive multiple of 16."""
        if tile is not None:
            check_tile(tile)
        return super().decoder(frames_per_call, tile, frame_chunk, on_host)

    def prepared(self, latents: Tensor) -> Tensor:
        z = self.denormalize(latents).to(self.dtype).transpose(1, 2)
        prepared: Tensor = self.module.post_quant_conv(z)
        return prepared

    def operations(self, height: int, width: int, tile: int, ranks: int) -> list[float]:
        return TiledFrames(self.module.decoder, tile).operations(height, width, ranks)

    def new_frames(self, tile: int | None, frame_chunk: int, host: PinnedBuffers | None) -> FrameDecoder:
        if tile is not None:
            return TiledFrames(self.module.decoder, tile, frame_chunk, host, self.exchange)
        layers = self.module.decoder.layers()
        second, third = [i for i, layer in enumerate(layers) if isinstance(layer, Upsample)][-2:]
        # Of the last two parts the first doubles the frames.
        parts = (
            DecoderStage(layers[:second]),
            DecoderStage(layers[second:third], max(frame_chunk // 2, 1)),
            DecoderStage(layers[third:], frame_chunk),
        )
        return UntiledDecoder(parts, self._steady if host is None else None, host=host)


def _build(config: VAEConfig) -> VAEModule:
    with torch.device("meta"):
        return VAEModule(config)
