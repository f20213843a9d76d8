"""The Wan VAE's decoder for a few latent frames: on whole frames, or in spatial tiles that need less memory.

The middle of the decoder attends over the whole frame, so no tile of the latents decodes to the tile of the pixels. But
that part works on few pixels: what takes memory are the last levels, and those are convolutions alone. `TiledFrames`
runs the decoder up to its first enlargement on the whole frame, then the rest in two stages tile by tile, each tile
with the margin (halo) of input that its pixels depend on. So tiles and whole frames differ by float rounding alone.
The halo is computed from the layers; at the frame's border there is none, and the convolutions pad as they always do.
For Wan 2.1 it is 7 pixels of the first stage's input and 10 of the second's: 28 and 20 pixels of the video. What the
tiles save is activations: together their caches are as large as the whole frame's, and the halos on top.
This file knows Diffusers' layers; it does not know normalised latents, nor how frames follow each other in a video.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from utils.errors import InputError

TILE_MULTIPLE = 16  # output pixels: a tile's border must fall between the pixels of every level

# One slot a causal convolution: its last two input frames, or the layers' own mark for "first frame seen".
Slots = list[Tensor | str | None]


class FrameDecoder(Protocol):
    """Decodes a video's latent frames in order and keeps what the next ones need."""

    def decode(self, z: Tensor, video: Tensor) -> None:
        """Latents [B, z_dim, F, h, w], past post_quant_conv, into `video` [B, frames, 3, H, W], clamped to [-1, 1]."""

    def cache_bytes(self) -> int:
        """Bytes kept for the next frames."""


class WholeFrames:
    """A FrameDecoder that runs the decoder as it is."""

    def __init__(self, decoder: nn.Module) -> None:
        self._decoder = decoder
        self._cache: Slots = [None] * count_causal_convolutions(decoder)

    def decode(self, z: Tensor, video: Tensor) -> None:
        first = self._cache[0] is None
        pixels = self._decoder(z, feat_cache=self._cache, feat_idx=[0], first_chunk=first)  # [B, 3, frames, H, W]
        torch.clamp(pixels.transpose(1, 2), -1.0, 1.0, out=video)

    def cache_bytes(self) -> int:
        return _cache_bytes([self._cache])


@dataclass(frozen=True)
class Stage:
    """Consecutive layers: an input pixel becomes `scale` x `scale` pixels; `halo` counts input pixels, see halo()."""

    layers: tuple[nn.Module, ...]
    scale: int
    halo: int


@dataclass(frozen=True)
class Tile:
    """A rectangle in output pixels: rows top to bottom, columns left to right, the ends excluded."""

    top: int
    bottom: int
    left: int
    right: int


class TiledFrames:
    """A FrameDecoder that runs the last levels tile by tile; no tile's side exceeds `tile` output pixels.

    Every tile keeps a feature cache of its own, halo included. Raises InputError unless `tile` is a positive multiple
    of 16.
    """

    def __init__(self, decoder: nn.Module, tile: int) -> None:
        if tile < TILE_MULTIPLE or tile % TILE_MULTIPLE:
            raise InputError(f"vae_tile: {tile} pixels is no positive multiple of {TILE_MULTIPLE}.")
        self._tile = tile
        self._whole, self._stages = split(decoder)
        self._whole_cache = _empty_cache(self._whole.layers)
        self._caches: dict[tuple[int, Tile], Slots] = {}

    def decode(self, z: Tensor, video: Tensor) -> None:
        height, width = video.shape[-2:]
        tiles = list(tiling(height, width, self._tile))
        x = run(self._whole.layers, z, self._whole_cache)
        last = len(self._stages) - 1
        for index in range(last):
            x = self._assemble(index, x, tiles, height)
        for tile in tiles:
            pixels = self._run_tile(last, x, tile, height).transpose(1, 2)
            torch.clamp(pixels, -1.0, 1.0, out=video[..., tile.top : tile.bottom, tile.left : tile.right])

    def _assemble(self, index: int, x: Tensor, tiles: Sequence[Tile], height: int) -> Tensor:
        """One stage of the whole frame, [B, C, F, h, w] to [B, C', F', h', w']."""
        scale = self._stages[index].scale
        per_pixel = height // (x.shape[-2] * scale)  # pixels of the video a pixel that comes out
        whole = None
        for tile in tiles:
            piece = self._run_tile(index, x, tile, height)
            if whole is None:
                whole = piece.new_empty(*piece.shape[:3], x.shape[-2] * scale, x.shape[-1] * scale)
            rows, columns = (slice(a // per_pixel, b // per_pixel) for a, b in _sides(tile))
            whole[..., rows, columns] = piece
        assert whole is not None
        return whole

    def _run_tile(self, index: int, x: Tensor, tile: Tile, height: int) -> Tensor:
        """The tile's part of what a stage makes of `x`, without the halo."""
        stage = self._stages[index]
        per_pixel = height // x.shape[-2]
        cache = self._caches.setdefault((index, tile), _empty_cache(stage.layers))
        inputs, outputs = [], []
        for (start, stop), size in zip(_sides(tile), x.shape[-2:], strict=True):
            low, high = start // per_pixel, stop // per_pixel
            first = max(low - stage.halo, 0)
            inputs.append(slice(first, min(high + stage.halo, size)))
            outputs.append(slice((low - first) * stage.scale, (high - first) * stage.scale))
        return run(stage.layers, x[..., inputs[0], inputs[1]], cache)[..., outputs[0], outputs[1]]

    def cache_bytes(self) -> int:
        return _cache_bytes([self._whole_cache, *self._caches.values()])


def _sides(tile: Tile) -> tuple[tuple[int, int], tuple[int, int]]:
    return (tile.top, tile.bottom), (tile.left, tile.right)


def tiling(height: int, width: int, tile: int) -> Iterator[Tile]:
    """Tiles of about equal size, no side above `tile`, that cover height x width output pixels, row by row."""
    for (top, bottom), (left, right) in product(_spans(height, tile), _spans(width, tile)):
        yield Tile(top, bottom, left, right)


def _spans(size: int, tile: int) -> list[tuple[int, int]]:
    count = -(-size // tile)
    step = -(-size // (count * TILE_MULTIPLE)) * TILE_MULTIPLE
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def split(decoder: nn.Module) -> tuple[Stage, tuple[Stage, ...]]:
    """The decoder's layers in order: those that run on whole frames, and the stages that run in tiles.

    The cuts are where the whole frame that lies between two stages is small beside what a stage has inside: after the
    first and the second of three enlargements. Fewer cuts would need wider halos, so larger caches and more work; more
    cuts, whole frames of the last level's features.
    """
    start = [decoder.get_submodule(name) for name in ("conv_in", "mid_block")]
    blocks = list(cast("nn.ModuleList", decoder.get_submodule("up_blocks")))
    head = [decoder.get_submodule(name) for name in ("norm_out", "nonlinearity", "conv_out")]
    return _stage([*start, *blocks[:1]]), (_stage(blocks[1:2]), _stage([*blocks[2:], *head]))


def _stage(layers: Sequence[nn.Module]) -> Stage:
    return Stage(tuple(layers), enlargement(layers), halo(layers))


def _parts(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """All layers within `layers`, in the order in which they run (which is that of their registration)."""
    return [part for layer in layers for part in layer.modules()]


def enlargement(layers: Sequence[nn.Module]) -> int:
    """How many output pixels a side become of one input pixel: 2 for each enlargement."""
    return int(2 ** sum(isinstance(part, nn.Upsample) for part in _parts(layers)))


def halo(layers: Sequence[nn.Module]) -> int:
    """How many input pixels around a rectangle the output of that rectangle depends on.

    Counted from the output back: a convolution of width k adds (k - 1) / 2, an enlargement by 2 halves, rounded up.
    Layers that attend over the whole frame are not counted.
    """
    margin = 0
    for part in reversed(_parts(layers)):
        if isinstance(part, (nn.Conv2d, nn.Conv3d)):
            margin += part.kernel_size[-1] // 2
        elif isinstance(part, nn.Upsample):
            margin = -(-margin // 2)
    return margin


def run(layers: Sequence[nn.Module], x: Tensor, cache: Slots) -> Tensor:
    """The decoder's `layers` on [B, C, F, h, w], with the slots of their causal convolutions, as Diffusers does it."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanMidBlock, WanUpBlock

    position = [0]
    for layer in layers:
        if isinstance(layer, WanCausalConv3d):
            x = _causal_convolution(layer, x, cache, position)
        elif isinstance(layer, (WanMidBlock, WanUpBlock)):
            x = layer(x, feat_cache=cache, feat_idx=position)
        else:
            x = layer(x)
    assert position[0] <= len(cache)
    return x


def _causal_convolution(layer: nn.Module, x: Tensor, cache: Slots, position: list[int]) -> Tensor:
    """A convolution over the last two frames of the slot at `position` and `x`; the slot then holds x's last two."""
    slot = position[0]
    position[0] += 1
    earlier = cast("Tensor | None", cache[slot])
    kept = x[:, :, -2:].clone()
    if kept.shape[2] < 2 and earlier is not None:
        kept = torch.cat([earlier[:, :, -1:], kept], dim=2)
    cache[slot] = kept
    return cast("Tensor", layer(x, earlier))


def count_causal_convolutions(module: nn.Module) -> int:
    """The number of slots that a feature cache for `module` needs."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    return sum(isinstance(part, WanCausalConv3d) for part in module.modules())


def _empty_cache(layers: Sequence[nn.Module]) -> Slots:
    return [None] * sum(count_causal_convolutions(layer) for layer in layers)


def _cache_bytes(caches: Sequence[Slots]) -> int:
    return sum(entry.nbytes for cache in caches for entry in cache if isinstance(entry, Tensor))
