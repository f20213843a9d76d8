"""Encoder and decoder of Wan's VAE, and its sizes: which layers follow each other.

Names of parameters and of sizes are those of Diffusers' AutoencoderKLWan. This file does not know how frames follow
each other in a video, nor normalised latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from utils.config import build
from utils.errors import InputError, shown
from wan.checkpoints.files import identify_hint, some_names
from wan.vae.feature_cache import FeatureCache
from wan.vae.layers import CUBE, CausalConv3d, Downsample, MidBlock, ResidualBlock, Upsample
from wan.vae.norm import RMSNorm

RES_BLOCKS = 2
LEVELS = 4
MOST_CHANNELS = 65536  # of any layer; Wan 2.1 has 384

# Of the latents of Wan 2.1, channel by channel.
MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


@dataclass(frozen=True)
class VAEConfig:
    """Sizes, in Diffusers' spelling; the defaults are those of Wan 2.1."""

    base_dim: int = 96
    decoder_base_dim: int | None = None  # None: as base_dim
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = RES_BLOCKS
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = MEAN
    latents_std: tuple[float, ...] = STD

    @classmethod
    def from_mapping(cls, settings: Mapping[str, object], source: Path) -> VAEConfig:
        """From the configuration of AutoencoderKLWan. Raises InputError if it is of another kind of VAE."""
        name = shown(source)
        if settings.get("is_residual") or settings.get("patch_size") is not None:
            raise InputError(f"{name} is a Wan 2.2 VAE (is_residual, patch_size); the models here use Wan 2.1's.")
        if settings.get("attn_scales"):
            scales = shown(settings["attn_scales"], 40)
            raise InputError(f"{name} has attention at attn_scales {scales}; Wan 2.1's VAE has none.")
        known = {field.name for field in fields(cls)}
        config = build(cls, {key: value for key, value in settings.items() if key in known}, name)
        if not config.z_dim == len(config.latents_mean) == len(config.latents_std):
            raise InputError(
                f"{name}: z_dim is {config.z_dim}, but latents_mean and latents_std have {len(config.latents_mean)} "
                f"and {len(config.latents_std)} entries; give all three in the VAE's config.json."
            )
        widths = (config.base_dim, config.decoder_base_dim or config.base_dim, config.z_dim, *config.dim_mult)
        levels = (LEVELS, LEVELS - 1, RES_BLOCKS)
        found = (len(config.dim_mult), len(config.temperal_downsample), config.num_res_blocks)
        if min(widths) < 1 or max(widths) > MOST_CHANNELS or found != levels:
            raise InputError(
                f"{name} is no Wan 2.1 VAE: it has widths {shown(widths, 80)}, {found[0]} levels, {found[1]} "
                f"temperal_downsample and num_res_blocks {found[2]}; wanted are widths from 1 to {MOST_CHANNELS} and "
                f"{levels[0]}, {levels[1]} and {levels[2]} of the others."
            )
        return config

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor], source: Path) -> VAEConfig:
        """From the shapes of the tensors: the widths, the latent channels and which levels halve the time axis.

        Raises InputError when the tensors are not those of a Wan 2.1 VAE.
        """
        stages = [RES_BLOCKS * level + level - 1 for level in range(1, LEVELS)]  # the downsampling layers: 2, 5, 8
        lasts = [*(stage - 1 for stage in stages), stages[-1] + RES_BLOCKS]  # the last residual block of each level
        needed = [
            "encoder.conv_in.weight",
            "decoder.conv_in.weight",
            "decoder.conv_out.weight",
            *(f"encoder.down_blocks.{last}.conv2.weight" for last in lasts),
        ]
        absent = [name for name in needed if name not in state or state[name].ndim != 5 or 0 in state[name].shape]
        if absent:
            raise InputError(
                f"{shown(source)} is not a Wan 2.1 VAE: it lacks {some_names(absent)} (Diffusers' names). "
                f"{identify_hint(source)}"
            )
        base = state["encoder.conv_in.weight"].shape[0]
        settings: dict[str, object] = {
            "base_dim": base,
            "decoder_base_dim": state["decoder.conv_out.weight"].shape[1],
            "z_dim": state["decoder.conv_in.weight"].shape[1],
            "dim_mult": [state[f"encoder.down_blocks.{last}.conv2.weight"].shape[0] // base for last in lasts],
            "temperal_downsample": [f"encoder.down_blocks.{stage}.time_conv.weight" in state for stage in stages],
        }
        return cls.from_mapping(settings, source)


class Head(nn.Module):
    """The last convolution, after the last norm."""

    def __init__(self, norm: RMSNorm, convolution: CausalConv3d) -> None:
        super().__init__()
        self.norm = norm
        self.convolution = convolution

    def forward(self, x: Tensor, history: FeatureCache) -> Tensor:
        return cast("Tensor", self.convolution(x, history, self.norm))


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.base_dim * factor for factor in (1, *config.dim_mult)]
        self.conv_in = CausalConv3d(3, widths[0], CUBE)
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths[1:]):
            before = widths[level]
            for _ in range(config.num_res_blocks):
                self.down_blocks.append(ResidualBlock(before, width))
                before = width
            if level < len(config.temperal_downsample):
                self.down_blocks.append(Downsample(width, config.temperal_downsample[level]))
        self.mid_block = MidBlock(widths[-1])
        self.norm_out = RMSNorm(widths[-1], 3)
        self.conv_out = CausalConv3d(widths[-1], 2 * config.z_dim, CUBE)

    def layers(self) -> list[nn.Module]:
        """All layers in order, from pixels to means and log variances."""
        return [self.conv_in, *self.down_blocks, self.mid_block, Head(self.norm_out, self.conv_out)]


class UpBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, blocks: int, time: bool | None) -> None:
        """`time`: whether the enlargement at the end doubles the frames too; None: no enlargement."""
        super().__init__()
        widths = [channels_in, *[channels_out] * (blocks - 1)]
        self.resnets = nn.ModuleList([ResidualBlock(width, channels_out) for width in widths])
        self.upsamplers = None if time is None else nn.ModuleList([Upsample(channels_out, time)])


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        base = config.decoder_base_dim or config.base_dim
        widths = [base * factor for factor in config.dim_mult[::-1]]
        times: Sequence[bool | None] = [*config.temperal_downsample[::-1], None]
        self.conv_in = CausalConv3d(config.z_dim, widths[0], CUBE)
        self.mid_block = MidBlock(widths[0])
        self.up_blocks = nn.ModuleList()
        before = widths[0]
        for width, time in zip(widths, times, strict=True):
            self.up_blocks.append(UpBlock(before, width, config.num_res_blocks + 1, time))
            before = width // 2
        self.norm_out = RMSNorm(widths[-1], 3)
        self.conv_out = CausalConv3d(widths[-1], 3, CUBE)

    def layers(self) -> list[nn.Module]:
        """All layers in order, from latents to pixels."""
        layers: list[nn.Module] = [self.conv_in, self.mid_block]
        for block in cast("Sequence[UpBlock]", self.up_blocks):
            layers += [*block.resnets, *(block.upsamplers or [])]
        return [*layers, Head(self.norm_out, self.conv_out)]


class VAEModule(nn.Module):
    """All parameters of a VAE; build it on the meta device and load it."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.post_quant_conv = nn.Conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    def lay_out(self, conv3d_as_conv2d: bool) -> None:
        """Put the convolutions' weights in memory as the frames are; `conv3d_as_conv2d` as in CausalConv3d."""
        for layer in self.modules():
            if isinstance(layer, CausalConv3d):
                layer.use_conv3d_as_conv2d(conv3d_as_conv2d)
            elif isinstance(layer, nn.Conv2d):
                layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
