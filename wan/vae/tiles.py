"""The Wan VAE's decoder for a few latent frames in spatial tiles, which need less memory than whole frames.

What takes memory are the last levels. The middle of the decoder attends over the whole frame, so no tile of the latents
decodes to the tile of the pixels; but that part works on few pixels, and the levels after it are convolutions alone.
`TiledFrames` runs the decoder up to its first enlargement on the whole frame, then the rest in two stages tile by tile,
each tile with the margin (halo) of input that its pixels depend on. So tiles and whole frames differ by float rounding
alone. The halo is computed from the layers; at the frame's border there is none, and the convolutions pad as they
always do. For Wan 2.1 it is 7 pixels of the first stage's input and 10 of the second's: 28 and 20 pixels of the video.
What the tiles save is activations: together their caches are as large as the whole frame's, and the halos on top.
Several processes can share out the tiles (`deal`): each runs both stages of its own, and between the stages they send
each other what their halos reach of the others'; every tile is computed from the same numbers as by one process.
Caches can lie in the host's memory (`FeatureCache`): then small tiles that work on several frames at once take least,
for every piece of frames brings the cache there and back. This file does not know normalised latents, nor how frames
follow each other in a video.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from types import EllipsisType

import torch
from torch import Tensor, nn

from utils.errors import InputError
from utils.pinned_buffers import PinnedBuffers
from wan.attention.exchange import HeadExchange, longest_first
from wan.vae.feature_cache import FeatureCache
from wan.vae.layers import Upsample, run
from wan.vae.modules import Decoder

Place = tuple[EllipsisType, slice, slice]  # rows and columns

TILE_MULTIPLE = 16  # output pixels: a tile's border must fall between the pixels of every level


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

    def __init__(
        self,
        decoder: Decoder,
        tile: int,
        frame_chunk: int = 1,
        host: PinnedBuffers | None = None,
        exchange: HeadExchange | None = None,
    ) -> None:
        """`frame_chunk`: pixel frames that the last stage works on at once, the one before on half as many. `host`: as
        in FeatureCache. With an `exchange` the tiles are dealt out, and of a video only this rank's are written."""
        check_tile(tile)
        self._tile = tile
        self._frame_chunk = frame_chunk
        self._whole, self._stages = split(decoder)
        self._host = host
        self._exchange = exchange
        self._history = FeatureCache(host)
        self._histories: dict[tuple[int, Tile], FeatureCache] = {}
        self._alike: dict[Tile, int] = {}  # on the meta device: for how many tiles one stands

    def decode(self, z: Tensor, video: Tensor) -> None:
        tiles = self._tiles(video)
        done = 0
        for frame_chunk in torch.split(
            run(self._whole.layers, z, self._history), max(self._frame_chunk // 2, 1), dim=2
        ):
            x = self._assemble(frame_chunk, tiles, video.shape[-2:])
            self._finish(x, tiles, video[:, done : done + x.shape[2]])
            done += x.shape[2]

    def _tiles(self, video: Tensor) -> list[Tile]:
        """This rank's tiles, all of them if there is no other; on the meta device, where only sizes count, the first of
        those of the same size."""
        sides = video.shape[-2:]
        tiles = self._dealt(sides)[0 if self._exchange is None else self._exchange.rank]
        if not video.is_meta:
            return tiles
        first_of: dict[tuple[int, ...], Tile] = {}
        self._alike = {}
        for tile in tiles:
            inputs = [part for index in (0, 1) for part in self._reach(index, tile, sides)[0]]
            first = first_of.setdefault(tuple(part.stop - part.start for part in inputs), tile)
            self._alike[first] = self._alike.get(first, 0) + 1
        return list(self._alike)

    def _dealt(self, sides: Sequence[int]) -> list[list[Tile]]:
        """The tiles of every rank."""
        return deal(sides[0], sides[1], self._tile, 1 if self._exchange is None else self._exchange.ranks)

    def _finish(self, x: Tensor, tiles: Sequence[Tile], video: Tensor) -> None:
        """The last stage, [B, C, F, h, w] into `video` [B, F, 3, H, W]."""
        for tile in tiles:
            part = video[..., tile.top : tile.bottom, tile.left : tile.right]
            for i, frame_chunk in enumerate(torch.split(x, self._frame_chunk, dim=2)):
                pixels = self._run_tile(1, frame_chunk, tile, video.shape[-2:]).transpose(1, 2)
                torch.clamp(
                    pixels, -1.0, 1.0, out=part[:, i * self._frame_chunk : i * self._frame_chunk + pixels.shape[1]]
                )

    def _assemble(self, x: Tensor, tiles: Sequence[Tile], sides: Sequence[int]) -> Tensor:
        """The stage before the last of the whole frame, [B, C, F, h, w] to [B, C', F', h', w']; of several ranks, what
        this one's tiles are made of."""
        scale, per_pixel = (stage.scale for stage in self._stages)  # `per_pixel` that comes out, pixels of the video
        whole = None
        for tile in tiles:
            frame_chunk = self._run_tile(0, x, tile, sides)
            if whole is None:
                whole = frame_chunk.new_empty(*frame_chunk.shape[:3], x.shape[-2] * scale, x.shape[-1] * scale)
            rows, columns = (slice(a // per_pixel, b // per_pixel) for a, b in _sides(tile))
            whole[..., rows, columns] = frame_chunk
        if self._exchange is not None:
            self._trade(self._exchange, x if whole is None else whole, sides)
        return x if whole is None else whole

    def _trade(self, exchange: HeadExchange, whole: Tensor, sides: Sequence[int]) -> None:
        """Bring what the tiles of every rank reach of those of the others into its `whole` [B, C, F, h, w]."""
        dealt, rank = self._dealt(sides), exchange.rank
        sent = [[whole[place] for place in self._reached(dealt[rank], other, sides)] for other in dealt]
        places = [self._reached(other, dealt[rank], sides) for other in dealt]
        sent[rank], places[rank] = [], []
        targets = [[whole[place] for place in of_one] for of_one in places]
        sizes = [sum(target.numel() for target in of_one) for of_one in targets]
        fill(targets, exchange.trade(sent, sizes, whole))

    def _reached(self, tiles: Sequence[Tile], others: Sequence[Tile], sides: Sequence[int]) -> list[Place]:
        """Where, in what comes out of the stage before the last, `tiles` are that the last stage of `others` takes."""
        per_pixel = self._stages[1].scale
        found = []
        for tile, other in product(tiles, others):
            reach = self._reach(1, other, sides)[0]
            rows, columns = (
                slice(max(low // per_pixel, part.start), min(high // per_pixel, part.stop))
                for (low, high), part in zip(_sides(tile), reach, strict=True)
            )
            if rows.start < rows.stop and columns.start < columns.stop:
                found.append((..., rows, columns))
        return found

    def _run_tile(self, index: int, x: Tensor, tile: Tile, sides: Sequence[int]) -> Tensor:
        """The tile's part of what a stage makes of `x`, without the halo; the video has these `sides`."""
        stage = self._stages[index]
        history = self._histories.setdefault((index, tile), FeatureCache(self._host))
        inputs, outputs = self._reach(index, tile, sides)
        return run(stage.layers, x[..., inputs[0], inputs[1]], history)[..., outputs[0], outputs[1]]

    def _reach(self, index: int, tile: Tile, sides: Sequence[int]) -> tuple[list[slice], list[slice]]:
        """Rows and columns of a stage's input that a tile of a video of these sides needs, and those of what comes out
        that are the tile."""
        stage = self._stages[index]
        per_pixel = math.prod(later.scale for later in self._stages[index:])  # pixels of the video a pixel of the input
        inputs, outputs = [], []
        for (start, stop), side in zip(_sides(tile), sides, strict=True):
            low, high = start // per_pixel, stop // per_pixel
            first = max(low - stage.halo, 0)
            inputs.append(slice(first, min(high + stage.halo, side // per_pixel)))
            outputs.append(slice((low - first) * stage.scale, (high - first) * stage.scale))
        return inputs, outputs

    def operations(self, height: int, width: int, ranks: int) -> list[float]:
        """What every rank computes of a latent frame of height x width pixels, if tiles are dealt to so many; attention
        is not counted."""
        scale = self._whole.scale * math.prod(stage.scale for stage in self._stages)
        whole = height // scale * (width // scale) * operations(self._whole.layers)
        once = [operations(stage.layers) for stage in self._stages]
        frames = [doublings(self._whole.layers), doublings((*self._whole.layers, *self._stages[0].layers))]

        def of_tile(tile: Tile) -> float:
            reaches = [self._reach(index, tile, (height, width))[0] for index in (0, 1)]
            pixels = [math.prod(part.stop - part.start for part in reach) for reach in reaches]
            return sum(math.prod(factors) for factors in zip(pixels, once, frames, strict=True))

        return [whole + sum(map(of_tile, tiles)) for tiles in deal(height, width, self._tile, ranks)]

    def cache_bytes(self) -> int:
        tiles = (self._alike.get(tile, 1) * history.nbytes() for (_, tile), history in self._histories.items())
        return self._history.nbytes() + sum(tiles)

    def clear(self) -> None:
        for history in (self._history, *self._histories.values()):
            history.clear()


def check_tile(tile: int) -> None:
    """Raises InputError unless the side is one that tiles can have."""
    if tile < TILE_MULTIPLE or tile % TILE_MULTIPLE:
        raise InputError(f"vae_tile: {tile} pixels is no positive multiple of {TILE_MULTIPLE}.")


def _sides(tile: Tile) -> tuple[tuple[int, int], tuple[int, int]]:
    return (tile.top, tile.bottom), (tile.left, tile.right)


def tiling(height: int, width: int, tile: int) -> Iterator[Tile]:
    """Tiles of about equal size, no side above `tile`, that cover height x width output pixels, row by row."""
    for (top, bottom), (left, right) in product(_spans(height, tile), _spans(width, tile)):
        yield Tile(top, bottom, left, right)


def deal(height: int, width: int, tile: int, ranks: int) -> list[list[Tile]]:
    """The tiles of `tiling`, row by row, for every rank: the largest first, each to the rank with the least pixels."""
    tiles = list(tiling(height, width, tile))
    owners = longest_first([(one.bottom - one.top) * (one.right - one.left) for one in tiles], ranks)
    return [[one for one, owner in zip(tiles, owners, strict=True) if owner == rank] for rank in range(ranks)]


def gather_tiles(exchange: HeadExchange, frames: Tensor, height: int, width: int, tile: int) -> None:
    """Bring the tiles of all ranks into the first one's `frames` [B, F, rows, columns, 3], which may be less than the
    decoded height x width pixels; the others' tiles are in theirs."""
    dealt = deal(height, width, tile, exchange.ranks)
    own, nothing = exchange.rank, list[Tensor]()
    parts = [[frames[:, :, one.top : one.bottom, one.left : one.right] for one in of_one] for of_one in dealt]
    sent = [parts[own] if rank == 0 and own else nothing for rank in range(exchange.ranks)]
    targets = [of_one if rank and not own else nothing for rank, of_one in enumerate(parts)]
    fill(targets, exchange.trade(sent, [sum(part.numel() for part in of_one) for of_one in targets], frames))


def fill(targets: Sequence[Sequence[Tensor]], received: Sequence[Tensor]) -> None:
    """What has come from every rank, flat, to where it belongs."""
    for of_one, flat in zip(targets, received, strict=True):
        for target, part in zip(of_one, torch.split(flat, [target.numel() for target in of_one] or [0]), strict=False):
            target.copy_(part.view(target.shape))


def _spans(size: int, tile: int) -> list[tuple[int, int]]:
    count = -(-size // tile)
    step = -(-size // (count * TILE_MULTIPLE)) * TILE_MULTIPLE
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def split(decoder: Decoder) -> tuple[Stage, tuple[Stage, Stage]]:
    """The decoder's layers in order: those that run on whole frames, and the stages that run in tiles.

    The cuts are where the whole frame that lies between two stages is small beside what a stage has inside: after the
    first and the second of three enlargements. Fewer cuts would need wider halos, so larger caches and more work; more
    cuts, whole frames of the last level's features.
    """
    layers = decoder.layers()
    first, second, *_ = (i + 1 for i, layer in enumerate(layers) if isinstance(layer, Upsample))
    return _stage(layers[:first]), (_stage(layers[first:second]), _stage(layers[second:]))


def _stage(layers: Sequence[nn.Module]) -> Stage:
    return Stage(tuple(layers), enlargement(layers), halo(layers))


def _parts(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """All layers within `layers`, in the order in which they run (which is that of their registration)."""
    return [part for layer in layers for part in layer.modules()]


def enlargement(layers: Sequence[nn.Module]) -> int:
    """How many output pixels a side become of one input pixel: 2 for each enlargement."""
    return int(2 ** sum(isinstance(part, nn.Upsample) for part in _parts(layers)))


def doublings(layers: Sequence[nn.Module]) -> int:
    """How many frames become of one, but of a video's first."""
    return int(2 ** sum(isinstance(layer, Upsample) and layer.time_conv is not None for layer in layers))


def operations(layers: Sequence[nn.Module]) -> float:
    """Of the convolutions, for an input pixel and frame (a multiplication and an addition are two)."""
    total, pixels = 0.0, 1
    for layer in layers:
        if isinstance(layer, Upsample):
            total += 0 if layer.time_conv is None else 2 * pixels * layer.time_conv.weight.numel()
            pixels *= 4 * doublings([layer])
            total += sum(2 * pixels * part.weight.numel() for part in layer.resample if isinstance(part, nn.Conv2d))
        else:
            convolutions = (part for part in layer.modules() if isinstance(part, (nn.Conv2d, nn.Conv3d)))
            total += sum(2 * pixels * part.weight.numel() for part in convolutions)
    return total


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
