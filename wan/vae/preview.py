"""A small decoder of the same latents, for previews: TAEHV in its edition for Wan 2.1 (taew2_1).

Its pixels are not those of the VAE. It takes the latents as they are denoised, without the VAE's mean and standard
deviation. Every memory block sees its own input of the frame before, so that frames stream as the VAE's do. The first
three pixel frames of a video stand for no frame of it and are left out. Files of the same family for other VAEs differ
in their sizes, and are refused with the reason.

Source: the files and the README of github.com/madebyollin/taehv.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import InputError, shown
from utils.pinned_buffers import PinnedBuffers
from wan.checkpoints.files import some_names
from wan.checkpoints.filling import load_into
from wan.checkpoints.reading import read_tensors
from wan.checkpoints.state import stripped_tensors
from wan.geometry import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION
from wan.vae.feature_cache import FeatureCache
from wan.vae.layers import as_frames, as_video, doubled
from wan.vae.streaming import LatentDecoder
from wan.vae.untiled import DecoderStage, FrameDecoder, UntiledDecoder

Z_DIM = 16  # latent channels of Wan 2.1
COLOURS = 3
LEVELS = 3  # each ends with twice the height and width
BLOCKS = 3  # memory blocks of a level
LAYERS_OF_A_LEVEL = 6  # numbers that a level takes in the file: the blocks, the enlargement in two, a convolution
HEAD = "22"
SOURCE_HINT = "taew2_1.pth or taew2_1.safetensors of github.com/madebyollin/taehv is wanted."


@dataclass(frozen=True)
class PreviewConfig:
    """Sizes; the defaults are those of taew2_1."""

    widths: tuple[int, ...] = (256, 128, 64, 64)  # channels of each level, and before the last convolution
    strides: tuple[int, ...] = (1, 2, 2)  # frames that each level makes of one

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor], source: Path) -> PreviewConfig:
        """From the shapes of the tensors. Raises InputError when they are not those of a decoder for Wan 2.1."""
        stem, head = "decoder.1.weight", f"decoder.{HEAD}.weight"
        grows = [f"decoder.{_grow(level)}.conv.weight" for level in range(LEVELS)]
        changes = [f"decoder.{_grow(level) + 1}.weight" for level in range(LEVELS)]
        layers = (stem, *grows, *changes, head)
        absent = [name for name in layers if name not in state or state[name].ndim != 4 or 0 in state[name].shape]
        if absent:
            raise InputError(
                f"{shown(source)} is no TAEHV decoder: it lacks the layers {some_names(absent)}. {SOURCE_HINT}"
            )
        shapes = {name: state[name].shape for name in (stem, head)}
        strides = tuple(state[name].shape[0] // state[name].shape[1] for name in grows)
        _require(source, "latent channels", shapes[stem][1], Z_DIM)
        _require(source, "pixel frames of a latent frame", math.prod(strides), TEMPORAL_COMPRESSION)
        _require(source, "channels of a pixel", shapes[head][0], COLOURS)
        widths = (shapes[stem][0], *(state[name].shape[0] for name in changes))
        return cls(tuple(int(width) for width in widths), tuple(int(stride) for stride in strides))


def _require(source: Path, what: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise InputError(
            f"{shown(source)} is a TAEHV decoder of another model: it has {found} {what}, that of Wan 2.1 has "
            f"{wanted}. {SOURCE_HINT}"
        )


def _grow(level: int) -> int:
    """The number of a level's enlargement in the file."""
    return LAYERS_OF_A_LEVEL * level + 7


class FrameConv(nn.Conv2d):
    """A convolution of every frame on its own."""

    def __init__(self, channels_in: int, channels_out: int, bias: bool = True) -> None:
        super().__init__(channels_in, channels_out, 3, padding=1, bias=bias)

    def forward(self, x: Tensor, history: FeatureCache) -> Tensor:  # type: ignore[override]  # as every layer here
        return as_video(super().forward(as_frames(x)), x.shape[0])


class Stem(FrameConv):
    """The first layer; latents beyond 3 are bent back."""

    def forward(self, x: Tensor, history: FeatureCache) -> Tensor:  # type: ignore[override]  # as every layer here
        return F.relu_(super().forward(torch.tanh(x / 3) * 3, history))


class Head(FrameConv):
    """The last layer: from [0, 1], in which the weights count, to [-1, 1]."""

    def forward(self, x: Tensor, history: FeatureCache) -> Tensor:  # type: ignore[override]  # as every layer here
        return super().forward(F.relu_(x), history).mul_(2).sub_(1)  # x is the layer before's, which needs it no more


class MemoryBlock(nn.Module):
    """A residual block that sees its own input of the frame before, zeros before the first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        first = nn.Conv2d(2 * channels, channels, 3, padding=1)
        second, third = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.conv = nn.Sequential(first, nn.ReLU(inplace=True), second, nn.ReLU(inplace=True), third)

    def forward(self, x: Tensor, history: FeatureCache) -> Tensor:
        change = self.conv(as_frames(history.with_before(x)))
        return as_video(F.relu_(change.add_(as_frames(x))), x.shape[0])


class Grow(nn.Module):
    """Twice as high and wide, and `stride` frames of one."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, stride * channels, 1, bias=False)
        self._stride = stride

    def forward(self, x: Tensor, history: FeatureCache) -> Tensor:
        # The file enlarges first; every pixel goes through the convolution alone, so a quarter of them will do.
        frames = self.conv(as_frames(x)).unflatten(1, (self._stride, -1))  # [B·T, stride, C, H, W]
        return as_video(doubled(frames), x.shape[0])


class PreviewModule(nn.Module):
    """All parameters, under the file's names; build it on the meta device and load it."""

    def __init__(self, config: PreviewConfig) -> None:
        super().__init__()
        layers: dict[str, nn.Module] = {"1": Stem(Z_DIM, config.widths[0])}
        for level, stride in enumerate(config.strides):
            width, end = config.widths[level], _grow(level)
            layers |= {str(end - 1 - BLOCKS + i): MemoryBlock(width) for i in range(BLOCKS)}
            layers[str(end)] = Grow(width, stride)
            layers[str(end + 1)] = FrameConv(width, config.widths[level + 1], bias=False)
        layers[HEAD] = Head(config.widths[-1], COLOURS)
        self.decoder = nn.ModuleDict(layers)

    def layers(self) -> list[nn.Module]:
        """All layers in order, from latents to pixels."""
        return list(self.decoder.values())


class PreviewDecoder(LatentDecoder):
    """TAEHV's decoder; `decode` of its streams gives what the VAE's would, approximately."""

    module: PreviewModule

    def __init__(self, module: PreviewModule, config: PreviewConfig) -> None:
        super().__init__(module, Z_DIM, SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION)
        self.config = config

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype, device: torch.device | str) -> PreviewDecoder:
        """From taew2_1.pth or .safetensors; its encoder is left out. Raises InputError when names or shapes differ."""
        if "lighttae" in path.name.lower():
            # Names and shapes are those of taew2_1: nothing but the file's name can tell.
            raise InputError(f"{shown(path)}: LightX2V's decoders take latents of another scale. {SOURCE_HINT}")
        tensors = stripped_tensors(read_tensors(path), path)
        state = {name: tensor for name, tensor in tensors.items() if name.startswith("decoder.")}
        config = PreviewConfig.of_state(state, path)
        module = _build(config)
        load_into(module, state, path, dtype, device)
        return cls(module, config)

    @classmethod
    def published(cls, dtype: torch.dtype) -> PreviewDecoder:
        """taew2_1's sizes on the meta device, without weights: to find out what it takes."""
        return cls(_build(PreviewConfig()).to(dtype), PreviewConfig())

    def lay_out(self, conv3d_as_conv2d: bool) -> None:
        for layer in self.module.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)

    def prepared(self, latents: Tensor) -> Tensor:
        return latents.to(self.dtype).transpose(1, 2)

    def new_frames(self, tile: int | None, frame_chunk: int, host: PinnedBuffers | None) -> FrameDecoder:
        assert tile is None, "tiles are for the VAE"
        layers = self.module.layers()
        _, second, third = [i for i, layer in enumerate(layers) if isinstance(layer, Grow)]
        _, *growth = self.config.strides
        enter = [max(frame_chunk // math.prod(growth[i:]), 1) for i in range(len(growth))]
        parts = (
            DecoderStage(layers[:second]),
            DecoderStage(layers[second:third], enter[0]),
            DecoderStage(layers[third:], enter[1]),
        )
        return UntiledDecoder(parts, self._steady if host is None else None, TEMPORAL_COMPRESSION - 1, host)


def _build(config: PreviewConfig) -> PreviewModule:
    with torch.device("meta"):
        return PreviewModule(config)
