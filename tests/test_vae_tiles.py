"""Decoding in tiles: the pixels of whole frames, halos that are as wide as needed and no wider, and less memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from utils.errors import InputError
from utils.memory import PeakTracker
from utils.video import to_uint8
from wan.vae.feature_cache import FeatureCache
from wan.vae.layers import run
from wan.vae.memory import DecodeBytes, _remembered, decode_bytes
from wan.vae.tiles import Stage, Tile, TiledFrames, split, tiling
from wan.vae.vae import VAE

VECTOR = Path(__file__).parent / "data" / "vectors" / "vae.safetensors"
GIB = 2**30


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    tensors = load_file(VECTOR)
    return {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}


@pytest.fixture(scope="module")
def vae(weights: dict[str, Tensor]) -> VAE:
    return VAE.from_state(weights, None, torch.float32, "cpu")


@pytest.fixture(scope="module")
def stages(vae: VAE) -> tuple[Stage, ...]:
    return split(vae.module.decoder)[1]


def _latents(height: int, width: int, frames: int = 3, batch: int = 1) -> Tensor:
    shape = (batch, frames, 16, height // 8, width // 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(height + width))


def _rounding(vae: VAE, latents: Tensor, tiled: Tensor) -> None:
    whole = vae.decoder().decode(latents)
    assert tiled.shape == whole.shape
    assert (tiled - whole).abs().max() < 1e-5
    assert torch.stack([to_uint8(a).int() - to_uint8(b) for a, b in zip(tiled, whole, strict=True)]).abs().max() <= 1


# Frames with room for tiles that have a halo on every side, on some, and for a last one that is narrow.
@pytest.mark.parametrize(
    ("height", "width", "tile"), [(96, 112, 16), (64, 128, 32), (40, 136, 48), (136, 24, 32), (64, 96, 64)]
)
def test_tiles_give_the_pixels_of_whole_frames(vae: VAE, height: int, width: int, tile: int) -> None:
    latents = _latents(height, width)
    _rounding(vae, latents, vae.decoder(tile=tile).decode(latents))


def test_one_tile_gives_whole_frames(vae: VAE) -> None:
    latents = _latents(48, 64, frames=4)
    _rounding(vae, latents, vae.decoder(tile=64).decode(latents))


def test_any_blocks_give_the_same_bits(vae: VAE) -> None:
    latents = _latents(48, 64, frames=6)
    whole = vae.decoder(tile=32).decode(latents)
    for sizes in ([3, 3], [1, 5], [2, 3, 1]):
        decoder = vae.decoder(tile=32)
        assert torch.equal(
            torch.cat([decoder.decode(frame_chunk) for frame_chunk in latents.split(sizes, dim=1)], 1), whole
        )
    _rounding(vae, latents, whole)


def test_several_frames_a_call_and_several_videos(vae: VAE) -> None:
    latents = _latents(48, 64, frames=5, batch=2)
    tiled = vae.decoder(frames_per_call=2, tile=32).decode(latents)
    assert (tiled - vae.decoder().decode(latents)).abs().max() < 2e-5


@pytest.mark.parametrize("frame_chunk", [1, 4])
def test_caches_on_the_host_change_no_bit(vae: VAE, frame_chunk: int) -> None:
    latents = _latents(48, 64, frames=5)
    here, away = (vae.decoder(2, 32, frame_chunk, on_host) for on_host in (False, True))
    for part in latents.split([2, 3], dim=1):
        assert torch.equal(away.decode(part), here.decode(part))


@pytest.mark.parametrize("frame_chunk", [2, 4, 12])
def test_larger_pieces_differ_by_rounding_alone(vae: VAE, frame_chunk: int) -> None:
    latents = _latents(48, 64, frames=5)
    _rounding(vae, latents, vae.decoder(3, 32, frame_chunk).decode(latents))


def test_two_videos_at_once_do_not_mix(vae: VAE) -> None:
    first, second = _latents(48, 64, frames=4), _latents(48, 64, frames=4).flip(1)
    a, b = vae.decoder(tile=32), vae.decoder(tile=32)
    pieces = [(a.decode(x), b.decode(y)) for x, y in zip(first.split(2, 1), second.split(2, 1), strict=True)]
    _rounding(vae, first, torch.cat([x for x, _ in pieces], 1))
    _rounding(vae, second, torch.cat([y for _, y in pieces], 1))


def test_the_video_is_clamped(vae: VAE) -> None:
    assert vae.decoder(tile=16).decode(50 * _latents(32, 48)).abs().max() == 1.0


def test_bfloat16(weights: dict[str, Tensor]) -> None:
    half = VAE.from_state(weights, None, torch.bfloat16, "cpu")
    latents = _latents(64, 96)
    difference = (half.decoder(tile=32).decode(latents) - half.decoder().decode(latents)).float().abs()
    assert difference.mean() < 1e-3


def test_operations_of_dealt_tiles_are_those_of_the_kernels(vae: VAE) -> None:
    """Of all ranks together, but for what all of them do to the whole frame."""
    latents = _latents(48, 80, frames=4)
    decoder = vae.decoder(tile=32)
    decoder.decode(latents[:, :3])
    with FlopCounterMode(display=False) as counter:
        decoder.decode(latents[:, 3:])
    counted = sum(number for name, number in counter.get_flop_counts()["Global"].items() if "convolution" in str(name))
    (alone,) = vae.operations(48, 80, 32, 1)
    assert alone == pytest.approx(counted, rel=0.01)
    shared = vae.operations(48, 80, 32, 3)
    assert alone / 3 < max(shared) < alone


def test_the_halos(stages: tuple[Stage, ...]) -> None:
    """By hand: (6 convolutions, enlargement, 1) and (6, enlargement, 1 + 6 + 1), in pixels of the stage's input."""
    assert [(stage.halo, stage.scale) for stage in stages] == [(6 + 1, 2), (6 + (1 + 6 + 1) // 2, 2)]


def _decode_around(stage: Stage, x: Tensor, inside: slice, margin: int) -> Tensor:
    """What a stage makes of the square `inside` if everything further than `margin` from it is not a number."""
    outer = slice(inside.start - margin, inside.stop + margin)
    spoilt = torch.full_like(x, torch.nan)
    spoilt[..., outer, outer] = x[..., outer, outer]
    history = FeatureCache()
    square = slice(inside.start * stage.scale, inside.stop * stage.scale)
    return torch.cat([run(stage.layers, spoilt, history)[..., square, square] for _ in range(2)], dim=2)


@pytest.mark.parametrize("index", [0, 1])
def test_the_halo_is_enough_and_one_less_is_not(stages: tuple[Stage, ...], index: int) -> None:
    stage = stages[index]
    channels = next(layer.weight.shape[1] for layer in stage.layers[0].modules() if isinstance(layer, torch.nn.Conv3d))
    side = 4 + 2 * stage.halo + 6
    x = torch.randn(1, channels, 1, side, side, generator=torch.Generator().manual_seed(index))
    inside = slice(stage.halo + 3, stage.halo + 7)
    with torch.no_grad():
        assert _decode_around(stage, x, inside, stage.halo).isfinite().all()
        short = _decode_around(stage, x, inside, stage.halo - 1)
    for edge in (short[..., 0, :], short[..., -1, :], short[..., 0], short[..., -1]):
        assert edge.isnan().all()


@pytest.mark.parametrize(("height", "width", "tile"), [(1088, 1920, 512), (480, 832, 256), (40, 24, 16), (720, 8, 128)])
def test_tiles_cover_the_frame_once(height: int, width: int, tile: int) -> None:
    covered = torch.zeros(height, width, dtype=torch.int)
    for one in tiling(height, width, tile):
        covered[one.top : one.bottom, one.left : one.right] += 1
        assert max(one.bottom - one.top, one.right - one.left) <= tile
        assert one.top % 16 == one.left % 16 == 0
    assert torch.equal(covered, torch.ones_like(covered))


def test_tiles_are_about_equal() -> None:
    tiles = list(tiling(1088, 1920, 512))
    assert len(tiles) == 3 * 4
    assert tiles[0] == Tile(0, 368, 0, 480)
    assert tiles[-1] == Tile(736, 1088, 1440, 1920)


@pytest.mark.parametrize("tile", [0, -16, 8, 100])
def test_tiles_that_cannot_be(vae: VAE, tile: int) -> None:
    with pytest.raises(InputError, match=rf"vae_tile: {tile} pixels is no positive multiple of 16"):
        vae.decoder(tile=tile)


def test_the_caches_never_grow(vae: VAE) -> None:
    decoder = vae.decoder(tile=32)
    assert decoder.cache_bytes() == 0
    sizes = []
    for frame in _latents(48, 64, frames=4).split(1, dim=1):
        decoder.decode(frame)
        sizes.append(decoder.cache_bytes())
    assert 0 < sizes[0] == sizes[1] == sizes[2] == sizes[3]


def test_attention_is_not_tiled(vae: VAE) -> None:
    """A far corner of the latents changes a tile's pixels: the frame is seen as a whole."""
    latents = _latents(32, 160, frames=1)
    changed = latents.clone()
    changed[..., :, -1] += 100.0
    before, after = (vae.decoder(tile=16).decode(x)[..., :16] for x in (latents, changed))
    assert not torch.equal(before, after)
    tiles = TiledFrames(vae.module.decoder, 16)
    assert tiles.cache_bytes() == 0


def test_1080p_takes_much_less_in_tiles() -> None:
    """The scores of the middle's attention, which fused kernels never make, would be 8.4 GiB in either case."""
    published = VAE.published(torch.bfloat16)
    video = published.decoder(tile=512).decode(torch.empty(1, 3, 16, 136, 240, device="meta"))
    assert video.shape == (1, 9, 3, 1088, 1920)
    whole, tiled = (decode_bytes(published, 1088, 1920, tile) for tile in (None, 512))
    assert 9.1 * GIB < whole.cache < 9.3 * GIB
    assert whole.activations > 7 * GIB
    assert tiled.activations < 2 * GIB
    assert tiled.cache < 1.15 * whole.cache
    assert tiled.total < 12.5 * GIB


@pytest.mark.parametrize(("tile", "width", "frames_per_call"), [(None, 96, 1), (32, 96, 1), (16, 48, 1), (None, 96, 2)])
def test_the_prediction_holds(
    vae: VAE, weights: dict[str, Tensor], tile: int | None, width: int, frames_per_call: int
) -> None:
    planned = VAE.from_state({name: t.to("meta") for name, t in weights.items()}, None, torch.float32, "meta")
    planned.lay_out_for(vae.device)
    predicted = decode_bytes(planned, 64, width, tile, block=2, frames_per_call=frames_per_call, batch=2)
    decoder, latents = vae.decoder(frames_per_call, tile), _latents(64, width, frames=3, batch=2)
    with PeakTracker() as tracker:
        for frame_chunk in latents.split([1, 2], dim=1):
            decoder.decode(frame_chunk)
    assert decoder.cache_bytes() == predicted.cache
    assert predicted.total == pytest.approx(tracker.peak, rel=0.02)


def test_a_prediction_is_made_once_for_decoders_that_are_alike() -> None:
    made = []

    @_remembered
    def predict(vae: VAE, height: int, tile: int | None = None) -> DecodeBytes:
        made.append((vae, height, tile))
        return DecodeBytes(len(made), 0)

    half = torch.bfloat16
    assert [predict(VAE.published(half), 64).cache for _ in range(2)] == [1, 1]
    others = VAE.published(torch.float32), VAE.published(half).lay_out_for(torch.device("cpu"))
    assert [predict(vae, 64).cache for vae in others] == [2, 3]
    assert [predict(VAE.published(half), 64, tile=tile).cache for tile in (32, 16, 32)] == [4, 5, 4]
    assert predict(VAE.published(half), 32).cache == 6
