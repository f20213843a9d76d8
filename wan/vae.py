"""The VAE: latents to video and back, in one piece or as the frames come.

The layers are Diffusers' AutoencoderKLWan; this file loads them from either published layout, normalises latents, and
keeps the causal convolutions' feature cache outside the module, so that several videos can be decoded at once and a
video's frames never stand in memory together. It does not know how latents are made nor how video is written.

Source: Wan 2.1 (arXiv 2503.20314), section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from utils.errors import InputError
from wan.checkpoint import load_into, read_json, read_tensors, some_names, stripped_tensors
from wan.vae_tiles import FrameDecoder, TiledFrames, WholeFrames, count_causal_convolutions

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
# What Diffusers' converter of Wan2.1_VAE.pth assumes; the names of the decoder's layers follow from it.
RES_BLOCKS = 2
LEVELS = 4


class Settings(Protocol):
    """What is read of AutoencoderKLWan's configuration, under its names and in its spelling."""

    z_dim: int
    dim_mult: list[int]
    temperal_downsample: list[bool]
    latents_mean: list[float]
    latents_std: list[float]


class VAE:
    """Wan's causal video VAE with normalised latents.

    `z_dim` latent channels (16); one latent pixel is `spatial_scale` (8) pixels wide and high; a latent frame is
    `temporal_scale` (4) pixel frames, except the first of a video, which is 1.
    """

    def __init__(self, module: nn.Module) -> None:
        settings = cast("Settings", module.config)
        self.module = module
        self.z_dim = settings.z_dim
        self.spatial_scale: int = 2 ** (len(settings.dim_mult) - 1)
        self.temporal_scale: int = 2 ** sum(settings.temperal_downsample)
        self._mean = self._per_channel(settings.latents_mean)
        self._std = self._per_channel(settings.latents_std)

    def _per_channel(self, values: list[float]) -> Tensor:
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
        if "decoder.conv1.weight" in state:
            state = _to_diffusers(state)
        settings = dict(config) if config is not None else infer_config(state, source)
        module = _build(settings, source)
        load_into(module, state, source, dtype, device)
        return cls(module.eval())

    @classmethod
    def published(cls, dtype: torch.dtype) -> VAE:
        """Wan 2.1's sizes on the meta device, without weights: to find out what it takes."""
        module = _build({}, Path("Wan 2.1")).eval()
        return cls(nn.Module.to(module, dtype))  # not Diffusers' own method, which warns of what it never did

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype, which is the video's."""
        return self._parameter().dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self._parameter().device

    def _parameter(self) -> nn.Parameter:
        return next(self.module.parameters())

    def to(self, device: torch.device | str) -> VAE:
        """Move the parameters; live decoders keep their cache where it is, so move between videos."""
        self.module.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    def pixel_frames(self, latent_frames: int) -> int:
        """The length in pixel frames of a video of `latent_frames` (at least 1): 21 -> 81."""
        return 1 + self.temporal_scale * (latent_frames - 1)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Video [B, frames, 3, H, W] in [-1, 1] to normalised float32 latents [B, F, z_dim, h, w]: the mean.

        Raises InputError unless frames = 1 + 4·k and H, W are multiples of 8.
        """
        self._check_video(video)
        encoder, quantise = self.module.get_submodule("encoder"), self.module.get_submodule("quant_conv")
        pixels = video.to(self.device, self.dtype).transpose(1, 2)
        cache: list[Tensor | str | None] = [None] * count_causal_convolutions(encoder)
        starts = range(1, pixels.shape[2], self.temporal_scale)
        chunks = [pixels[:, :, :1], *(pixels[:, :, i : i + self.temporal_scale] for i in starts)]
        features = [encoder(chunk, feat_cache=cache, feat_idx=[0]) for chunk in chunks]
        moments = quantise(torch.cat(features, dim=2))  # [B, 2 z_dim, F, h, w]: means, then log variances
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

    def decoder(self, frames_per_call: int = 1, tile: int | None = None) -> StreamingDecoder:
        """A decoder for one video (or one batch of videos); see StreamingDecoder."""
        return StreamingDecoder(self, frames_per_call, tile)


class StreamingDecoder:
    """Decodes one video's latent frames in order, any number at a time; the cache in between is bounded.

    With `frames_per_call` 1 every call of the module decodes one latent frame, and the pixels are bit-identical to
    those of the whole video decoded at once. With more, later frames go through the module several at a time: fewer
    and larger kernels and more memory for activations, the pixels about 5e-6 apart in float32. The first latent
    frame always goes alone.

    With `tile`, the last levels run in tiles of at most `tile` output pixels a side (a multiple of 16): less memory for
    activations, some of the work twice, the pixels apart by float rounding alone; see wan.vae_tiles.
    """

    def __init__(self, vae: VAE, frames_per_call: int = 1, tile: int | None = None) -> None:
        if frames_per_call < 1:
            raise InputError(f"frames_per_call is {frames_per_call}; at least 1 latent frame a call is needed.")
        module = vae.module.get_submodule("decoder")
        self._vae = vae
        self._frames_per_call = frames_per_call
        self._decoder: FrameDecoder = WholeFrames(module) if tile is None else TiledFrames(module, tile)
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
        z = vae.module.get_submodule("post_quant_conv")(z)
        video = self._empty_video(latents)
        done = 0
        for start, stop in self._calls(latents.shape[1]):
            frames = (stop - start) * vae.temporal_scale if self._started else 1
            self._decoder.decode(z[:, :, start:stop], video[:, done : done + frames])
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
        """Bytes that the feature cache holds now; constant from the second latent frame on."""
        return self._decoder.cache_bytes()


def _build(settings: Mapping[str, object], source: Path) -> nn.Module:
    """AutoencoderKLWan on the meta device."""
    from diffusers import AutoencoderKLWan

    if settings.get("is_residual") or settings.get("patch_size") is not None:
        raise InputError(f"{source} is a Wan 2.2 VAE (is_residual, patch_size); the models here use Wan 2.1's.")
    build = cast("Callable[[dict[str, object]], nn.Module]", AutoencoderKLWan.from_config)
    with torch.device("meta"):
        module = build(dict(settings))
    config = cast("Settings", module.config)
    if not config.z_dim == len(config.latents_mean) == len(config.latents_std):
        raise InputError(
            f"{source}: z_dim is {config.z_dim}, but latents_mean and latents_std have {len(config.latents_mean)} and "
            f"{len(config.latents_std)} entries; give all three in the VAE's config.json."
        )
    return module


def _to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from diffusers.loaders import single_file_utils

    convert = cast("Callable[[dict[str, Tensor]], dict[str, Tensor]]", single_file_utils.convert_wan_vae_to_diffusers)
    return convert(dict(state))


def infer_config(state: Mapping[str, Tensor], source: Path) -> dict[str, object]:
    """AutoencoderKLWan's configuration from the shapes of its tensors, under Diffusers' names.

    Read off are the widths, the latent channels and which levels halve the time axis. Raises InputError when the
    tensors are not those of a Wan 2.1 VAE.
    """
    stages = [RES_BLOCKS * level + level - 1 for level in range(1, LEVELS)]  # the downsampling layers: 2, 5, 8
    lasts = [*(stage - 1 for stage in stages), stages[-1] + RES_BLOCKS]  # the last residual block of each level
    needed = [
        "encoder.conv_in.weight",
        "decoder.conv_in.weight",
        "decoder.conv_out.weight",
        *(f"encoder.down_blocks.{last}.conv2.weight" for last in lasts),
    ]
    absent = [name for name in needed if name not in state]
    if absent:
        raise InputError(f"{source} is not a Wan 2.1 VAE: it lacks {some_names(absent)} (Diffusers' names).")
    base = state["encoder.conv_in.weight"].shape[0]
    return {
        "base_dim": base,
        "decoder_base_dim": state["decoder.conv_out.weight"].shape[1],
        "z_dim": state["decoder.conv_in.weight"].shape[1],
        "dim_mult": [state[f"encoder.down_blocks.{last}.conv2.weight"].shape[0] // base for last in lasts],
        "num_res_blocks": RES_BLOCKS,
        "temperal_downsample": [f"encoder.down_blocks.{stage}.time_conv.weight" in state for stage in stages],
    }
