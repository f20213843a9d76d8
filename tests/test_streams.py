"""What is decoded beside the denoising is ordered behind what it needs, and nothing waits that need not."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from pipeline.runtime.decoding import BlockDecoder, DecodeStrategy
from tests.fake_streams import FakeStream, OrderedStreams, streams
from utils.profiler import Profiler
from utils.transfer import SideStream
from wan.vae.modules import VAEConfig, VAEModule
from wan.vae.preview import PreviewDecoder
from wan.vae.streaming import LatentDecoder
from wan.vae.vae import VAE

__all__ = ["streams"]  # a fixture

META = torch.device("meta")
SHAPE = (2, 3, 16, 4, 6)


def small_vae() -> VAE:
    config = VAEConfig(base_dim=4)
    with META:
        return VAE(VAEModule(config).requires_grad_(False), config)


DECODERS = {"vae": small_vae, "preview": lambda: PreviewDecoder.published(torch.float32)}


def decode(vae: LatentDecoder, blocks: list[Tensor], aside: bool, tile: int | None = None) -> BlockDecoder:
    decoder = BlockDecoder(vae, (32, 48), Profiler(META), DecodeStrategy(3, tile, on_side_stream=aside))
    for latents in blocks:
        decoder.decode(latents)
    return decoder


def new_latents(device: str) -> Tensor:
    """Made by a denoising step."""
    return torch.zeros(SHAPE, device=device) + 1


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("place", ["meta", "cpu"], ids=["one GPU", "two GPUs"])
def test_decoding_beside_the_denoising(kind: str, place: str, streams: OrderedStreams) -> None:
    """Weights that are laid out anew on the decoder's device, blocks that come and go, another video after that."""
    vae = DECODERS[kind]()
    with streams:
        vae.lay_out_for(META)
        denoising = streams.current(place)
        for _ in range(2):
            decoder = decode(vae, [], aside=True)
            for _ in range(3):
                decoder.decode(new_latents(place))
            decoder.close()
        gc.collect()
        assert set(denoising.clock) == {denoising}  # it never waits for the decoder, however much that has to do
    assert streams.errors == []


@pytest.mark.parametrize("tile", [None, 32])
def test_memory_of_a_stream_serves_on_that_stream_alone(tile: int | None, streams: OrderedStreams) -> None:
    """Videos decoded in turns aside and not, of which one is left in the middle."""
    vae = small_vae()
    with streams:
        for aside in (True, False, False, True, False):
            decoder = decode(vae, [new_latents("meta") for _ in range(2)], aside, tile)
            decoder.close()
            gc.collect()
    assert streams.errors == []


def test_a_closed_decoder_serves_again_on_its_stream(streams: OrderedStreams) -> None:
    vae = small_vae()
    with streams:
        for aside in (True, False):
            first = decode(vae, [new_latents("meta")], aside)
            used = first._decoder._frames
            first.close()
            assert decode(vae, [new_latents("meta")], aside)._decoder._frames is used


def test_what_is_not_ordered_is_seen(streams: OrderedStreams) -> None:
    with streams:
        other, made = FakeStream("meta"), new_latents("meta")
        with streams.on(other):
            made.add_(1)
        assert len(streams.errors) == 1 and streams.errors[0].startswith("add_ of (2, 3, 16, 4, 6) does not wait")
        streams.errors.clear()
        ordered = new_latents("meta")
        with SideStream(META).after(ordered):
            ordered.mul_(2)
        del ordered
        assert streams.errors == []
        lost = new_latents("meta")
        other.wait_stream(streams.current("meta"))
        with streams.on(other):
            _ = lost + 1
        del lost
        assert streams.errors == ["(2, 3, 16, 4, 6) is freed while another stream may be at work on it"]
