"""The preview decoder: against a plain decoder of whole videos, in any blocks, at full size, and files that do not fit.

The weights are random, under the names of taew2_1.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from tests.small_checkpoints import preview_shapes, random_weights
from tests.test_vae import Rewinding, decibel, in_pieces
from utils.errors import InputError
from utils.memory import PeakTracker
from wan.vae.layers import run
from wan.vae.memory import decode_bytes
from wan.vae.preview import PreviewConfig, PreviewDecoder
from wan.vae.vae import VAE

WIDTHS = (12, 8, 6, 4)
BLOCKS = ["3 4 5", "9 10 11", "15 16 17"]


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return preview_weights()


def preview_weights(widths: tuple[int, ...] = WIDTHS) -> dict[str, Tensor]:
    return random_weights(preview_shapes(widths), torch.Generator().manual_seed(0))


def loaded(folder: Path, weights: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> PreviewDecoder:
    save_file(weights, folder / "taew2_1.safetensors")
    return PreviewDecoder.load(folder / "taew2_1.safetensors", dtype, "cpu")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, Tensor]) -> PreviewDecoder:
    return loaded(tmp_path_factory.mktemp("preview"), weights)


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return 2 * torch.randn(2, 7, 16, 6, 4, generator=torch.Generator().manual_seed(1))


def whole(weights: dict[str, Tensor], latents: Tensor) -> Tensor:
    """All frames through each layer in turn, in the order of the file: what the format says, as plainly as can be."""

    def convolve(x: Tensor, name: str) -> Tensor:
        weight, bias = weights[f"decoder.{name}.weight"], weights.get(f"decoder.{name}.bias")
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    batch = latents.shape[0]
    x = F.relu(convolve(3 * torch.tanh(latents.flatten(0, 1) / 3), "1"))
    for blocks, grow, after in zip(BLOCKS, ("7", "13", "19"), ("8", "14", "20"), strict=True):
        for block in blocks.split():
            video = x.unflatten(0, (batch, -1))
            past = torch.cat([torch.zeros_like(video[:, :1]), video[:, :-1]], dim=1).flatten(0, 1)
            y = torch.cat([x, past], dim=1)
            for part in ("0", "2", "4"):
                y = convolve(y, f"{block}.conv.{part}")
                y = F.relu(y) if part != "4" else y
            x = F.relu(y + x)
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        channels = x.shape[1]
        grown = convolve(x, f"{grow}.conv")
        x = convolve(grown.reshape(-1, channels, *grown.shape[2:]), after)
    pixels = convolve(F.relu(x), "22").clamp(0, 1).unflatten(0, (batch, -1))
    return 2 * pixels[:, 3:] - 1


def test_the_sizes_are_read_off_the_tensors(decoder: PreviewDecoder) -> None:
    assert decoder.config == PreviewConfig(WIDTHS, (1, 2, 2))
    assert (decoder.spatial_scale, decoder.temporal_scale, decoder.z_dim, decoder.tiles) == (8, 4, 16, False)


def test_a_whole_videos_pixels(decoder: PreviewDecoder, weights: dict[str, Tensor], latents: Tensor) -> None:
    video = decoder.decoder().decode(latents)
    assert video.shape == (2, 25, 3, 48, 32)
    assert 0.1 < video.std() < 0.9
    torch.testing.assert_close(video, whole(weights, latents), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sizes", [[7], [3, 3, 1], [1, 1, 1, 1, 1, 1, 1], [2, 5], [1, 6]])
@pytest.mark.parametrize(("frames_per_call", "frame_chunk"), [(1, 1), (1, 4), (3, 1), (3, 4), (3, 8), (7, 2)])
def test_any_blocks_give_the_same_pixels(
    decoder: PreviewDecoder,
    weights: dict[str, Tensor],
    latents: Tensor,
    sizes: list[int],
    frames_per_call: int,
    frame_chunk: int,
) -> None:
    video = in_pieces(decoder.decoder(frames_per_call, frame_chunk=frame_chunk), latents, sizes)
    torch.testing.assert_close(video, whole(weights, latents), rtol=0, atol=1e-5)
    if frames_per_call == 1:
        assert torch.equal(video, decoder.decoder(1, frame_chunk=frame_chunk).decode(latents))


def test_two_videos_at_once_do_not_mix(decoder: PreviewDecoder, latents: Tensor) -> None:
    first, second = latents[:1], latents[1:]
    a, b = decoder.decoder(), decoder.decoder()
    pairs = [(a.decode(x), b.decode(y)) for x, y in zip(first.split(3, 1), second.split(3, 1), strict=True)]
    assert torch.equal(torch.cat([x for x, _ in pairs], 1), decoder.decoder().decode(first))
    assert torch.equal(torch.cat([y for _, y in pairs], 1), decoder.decoder().decode(second))


def test_a_closed_decoders_memory_serves_the_next_video(decoder: PreviewDecoder, latents: Tensor) -> None:
    expected = decoder.decoder().decode(latents)
    used = decoder.decoder()
    used.decode(latents.flip(1))
    frames = used._frames
    used.close()
    again = decoder.decoder()
    assert torch.equal(again.decode(latents), expected)
    assert again._frames is frames


def test_the_cache_is_one_frame_a_memory_block(decoder: PreviewDecoder, latents: Tensor) -> None:
    streaming = decoder.decoder()
    sizes = set()
    for frame in latents.split(1, dim=1):
        streaming.decode(frame)
        sizes.add(streaming.cache_bytes())
    pixels = [3 * width * (6 * 2**level) * (4 * 2**level) for level, width in enumerate(WIDTHS[:3])]
    assert sizes == {2 * 4 * sum(pixels)}  # two videos, float32


def test_recorded_steps_give_the_same_in_every_video(
    tmp_path: Path, weights: dict[str, Tensor], latents: Tensor
) -> None:
    recorded = loaded(tmp_path, weights)
    recorder = Rewinding()
    recorded.prepare(2, run, recorder)
    for _ in range(2):
        streaming = recorded.decoder(2)
        first = streaming.decode(latents[:, :1])
        recorder.frames = streaming._frames
        video = torch.cat([first, streaming.decode(latents[:, 1:])], dim=1)
        streaming.close()
        torch.testing.assert_close(video, whole(weights, latents), rtol=0, atol=1e-5)
    assert recorder.replays == 5  # of 2 x 3 calls one is recorded


def test_the_steady_step_compiles_without_a_break(tmp_path: Path, weights: dict[str, Tensor], latents: Tensor) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = loaded(tmp_path, weights)
    compiled.prepare(2, torch.compile(run, fullgraph=True, dynamic=False, backend=counter))
    for _ in range(2):
        video = in_pieces(compiled.decoder(2), latents, [1, 2, 2, 2])
        torch.testing.assert_close(video, whole(weights, latents), rtol=0, atol=1e-5)
    assert counter.frame_count == 3


def test_the_video_is_clamped_and_bfloat16_stays_close(
    tmp_path: Path, weights: dict[str, Tensor], decoder: PreviewDecoder, latents: Tensor
) -> None:
    exact = decoder.decoder().decode(latents)
    assert exact.max() == 1.0 and exact.min() == -1.0
    half = loaded(tmp_path, weights, torch.bfloat16)
    assert decibel(half.decoder().decode(latents), exact) > 30


@pytest.mark.parametrize("name", ["taew2_1.pth", "taew2_1.safetensors"])
def test_full_size_on_the_meta_device(tmp_path: Path, name: str) -> None:
    """As published: float16, with an encoder that is left out."""
    state = {key: torch.zeros(shape, dtype=torch.float16) for key, shape in preview_shapes().items()}
    path = tmp_path / name
    if path.suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    decoder = PreviewDecoder.load(path, torch.bfloat16, "meta")
    assert decoder.config == PreviewConfig()
    assert set(decoder.module.state_dict()) == {key for key in state if key.startswith("decoder.")}
    assert sum(parameter.numel() for parameter in decoder.module.parameters()) == 9_844_611
    streaming = decoder.decoder(3)
    latents = torch.empty(1, 3, 16, 60, 104, device="meta")
    assert [streaming.decode(latents).shape for _ in range(2)] == [(1, 9, 3, 480, 832), (1, 12, 3, 480, 832)]
    vae = VAE.published(torch.bfloat16)
    assert decode_bytes(decoder, 480, 832).total < 0.2 * decode_bytes(vae, 480, 832).total


@pytest.mark.parametrize(("frames_per_call", "frame_chunk"), [(1, 1), (3, 4)])
def test_memory_is_as_predicted(
    tmp_path: Path, weights: dict[str, Tensor], decoder: PreviewDecoder, frames_per_call: int, frame_chunk: int
) -> None:
    save_file(weights, tmp_path / "taew2_1.safetensors")
    meta = PreviewDecoder.load(tmp_path / "taew2_1.safetensors", torch.float32, "meta").lay_out_for(decoder.device)
    expected = decode_bytes(meta, 128, 192, None, 3, frames_per_call, frame_chunk=frame_chunk)
    latents = torch.randn(1, 3, 16, 16, 24)
    streaming = decoder.decoder(frames_per_call, frame_chunk=frame_chunk)
    with PeakTracker() as tracker:
        for _ in range(2):
            streaming.decode(latents)
    assert tracker.peak == pytest.approx(expected.total, rel=0.02)


def without(name: str) -> dict[str, list[int]]:
    return {key: shape for key, shape in preview_shapes(WIDTHS).items() if key != name}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (without("decoder.13.conv.weight"), "no TAEHV decoder: it lacks the layers decoder.13.conv.weight. taew2_1"),
        ({"decoder.conv_in.weight": [8, 16, 3, 3, 3]}, "no TAEHV decoder: it lacks the layers decoder.1.weight, "),
        ({**preview_shapes(WIDTHS), "decoder.1.weight": [12]}, "it lacks the layers decoder.1.weight"),
        (
            {**preview_shapes(WIDTHS), "decoder.1.weight": [12, 48, 3, 3]},
            "of another model: it has 48 latent channels, that of Wan 2.1 has 16",
        ),
        (
            {**preview_shapes(WIDTHS), "decoder.7.conv.weight": [24, 12, 1, 1]},
            "it has 8 pixel frames of a latent frame, that of Wan 2.1 has 4",
        ),
        (
            {**preview_shapes(WIDTHS), "decoder.22.weight": [12, 4, 3, 3]},
            "it has 12 channels of a pixel, that of Wan 2.1 has 3",
        ),
        (without("decoder.9.conv.2.bias"), "not fit PreviewModule: .* 1 missing: decoder.9.conv.2.bias"),
        (
            {**preview_shapes(WIDTHS), "decoder.3.skip.weight": [12, 12, 1, 1]},
            "not fit PreviewModule: .* 1 unexpected: decoder.3.skip.weight",
        ),
        (
            {**preview_shapes(WIDTHS), "decoder.15.conv.0.weight": [6, 6, 3, 3]},
            "not fit PreviewModule: .* 1 of another shape: decoder.15.conv.0.weight",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused_with_the_reason(
    tmp_path: Path, shapes: dict[str, list[int]], message: str
) -> None:
    path = tmp_path / "some.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    with pytest.raises(InputError, match=rf"some\.safetensors .*{message}"):
        PreviewDecoder.load(path, torch.float32, "cpu")


def test_a_decoder_for_latents_of_another_scale_is_refused(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    path = tmp_path / "lighttaew2_1.safetensors"
    save_file(weights, path)
    with pytest.raises(InputError, match=r"lighttaew2_1\.safetensors: .* latents of another scale\. taew2_1\.pth or"):
        PreviewDecoder.load(path, torch.float32, "cpu")
