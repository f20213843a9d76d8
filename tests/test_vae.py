"""The VAE against the conformance vector, against Diffusers itself, and on the meta device at full size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from utils.errors import InputError
from wan.vae import VAE, StreamingDecoder

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def vector() -> dict[str, Tensor]:
    return load_file(DATA / "vectors" / "vae.safetensors")


@pytest.fixture(scope="module")
def weights(vector: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("weights."): t for name, t in vector.items() if name.startswith("weights.")}


@pytest.fixture(scope="module")
def vae(weights: dict[str, Tensor]) -> VAE:
    return VAE.from_state(weights, None, torch.float32, "cpu")


def whole(vae: VAE, latents: Tensor) -> Tensor:
    """Diffusers' own decode of the whole video."""
    return vae.module.decode(vae.denormalize(latents).transpose(1, 2)).sample.transpose(1, 2)


def in_pieces(decoder: StreamingDecoder, latents: Tensor, sizes: list[int]) -> Tensor:
    return torch.cat([decoder.decode(piece) for piece in latents.split(sizes, dim=1)], dim=1)


def test_the_sizes_are_read_off_the_tensors(vae: VAE) -> None:
    config = vae.module.config
    assert (config.base_dim, config.decoder_base_dim, config.z_dim) == (4, 4, 16)
    assert list(config.dim_mult) == [1, 2, 4, 4]
    assert list(config.temperal_downsample) == [False, True, True]
    assert (vae.spatial_scale, vae.temporal_scale, vae.z_dim) == (8, 4, 16)
    assert [vae.pixel_frames(frames) for frames in (1, 3, 21)] == [1, 9, 81]


def test_the_vectors_video(vae: VAE, vector: dict[str, Tensor]) -> None:
    video = vae.decoder().decode(vector["latents"])
    assert video.shape == (1, 21, 3, 32, 48)
    assert (video - vector["expect.video"].float()).abs().max() < 1e-3


def test_the_vectors_latents(vae: VAE, vector: dict[str, Tensor]) -> None:
    latents = vae.encode(vector["pixels"].float().transpose(1, 2))
    assert latents.shape == (1, 3, 16, 4, 6)
    assert (latents - vector["expect.encoded"]).abs().max() < 2e-4


@pytest.mark.parametrize("sizes", [[6], [3, 3], [1, 1, 1, 1, 1, 1], [1, 5], [2, 3, 1]])
def test_any_blocks_give_the_bits_of_the_whole_video(vae: VAE, vector: dict[str, Tensor], sizes: list[int]) -> None:
    latents = vector["latents"].repeat(2, 1, 1, 1, 1) * torch.tensor([1.0, 0.5]).view(2, 1, 1, 1, 1)
    assert torch.equal(in_pieces(vae.decoder(), latents, sizes), whole(vae, latents))


def test_first_block_9_frames_later_ones_12(vae: VAE, vector: dict[str, Tensor]) -> None:
    decoder = vae.decoder()
    assert [decoder.decode(piece).shape[1] for piece in vector["latents"].split(3, dim=1)] == [9, 12]


@pytest.mark.parametrize("frames_per_call", [2, 3, 8])
def test_several_frames_a_call_differ_by_rounding_alone(
    vae: VAE, vector: dict[str, Tensor], frames_per_call: int
) -> None:
    video = in_pieces(vae.decoder(frames_per_call), vector["latents"], [3, 3])
    assert (video - whole(vae, vector["latents"])).abs().max() < 2e-5


def test_two_videos_at_once_do_not_mix(vae: VAE, vector: dict[str, Tensor]) -> None:
    first, second = vector["latents"], vector["latents"].flip(1)
    a, b = vae.decoder(), vae.decoder()
    pieces = [(a.decode(x), b.decode(y)) for x, y in zip(first.split(2, 1), second.split(2, 1), strict=True)]
    assert torch.equal(torch.cat([x for x, _ in pieces], 1), whole(vae, first))
    assert torch.equal(torch.cat([y for _, y in pieces], 1), whole(vae, second))


def test_the_video_is_clamped(vae: VAE, vector: dict[str, Tensor]) -> None:
    assert vae.decoder().decode(50 * vector["latents"]).abs().max() == 1.0


def test_the_cache_stops_growing_at_the_second_frame(vae: VAE, vector: dict[str, Tensor]) -> None:
    decoder = vae.decoder()
    assert decoder.cache_bytes() == 0
    sizes = []
    for frame in vector["latents"].split(1, dim=1):
        decoder.decode(frame)
        sizes.append(decoder.cache_bytes())
    assert 0 < sizes[0] < sizes[1] == sizes[2] == sizes[-1]


def test_the_normalisation_is_its_own_inverse(vae: VAE, vector: dict[str, Tensor]) -> None:
    latents = vector["latents"]
    torch.testing.assert_close(vae.normalize(vae.denormalize(latents)), latents, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 8, 3, 32, 48), r"8 frames cannot be encoded: the number must be 1 \+ 4·k; make it 5"),
        ((1, 0, 3, 32, 48), "make it 1"),
        ((1, 5, 3, 30, 48), "3 channels, 30 x 48, cannot be encoded: 3 channels and multiples of 8"),
        ((1, 5, 4, 32, 48), "4 channels"),
    ],
)
def test_videos_that_cannot_be_encoded(vae: VAE, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        vae.encode(torch.zeros(shape))


def test_frames_per_call_must_be_positive(vae: VAE) -> None:
    with pytest.raises(InputError, match="frames_per_call is 0; at least 1"):
        vae.decoder(0)


def test_bfloat16_stays_close(weights: dict[str, Tensor], vae: VAE, vector: dict[str, Tensor]) -> None:
    half = VAE.from_state(weights, None, torch.bfloat16, "cpu")
    video = half.decoder().decode(vector["latents"])
    assert video.dtype == torch.bfloat16
    assert (video.float() - whole(vae, vector["latents"])).abs().mean() < 0.02


def test_the_published_file_and_the_diffusers_folder_give_the_same(
    tmp_path: Path, weights: dict[str, Tensor], vae: VAE, vector: dict[str, Tensor]
) -> None:
    torch.save(weights, tmp_path / "Wan2.1_VAE.pth")
    vae.module.save_pretrained(tmp_path / "vae")
    for path in (tmp_path / "Wan2.1_VAE.pth", tmp_path / "vae"):
        video = VAE.load(path, torch.float32, "cpu").decoder().decode(vector["latents"][:, :2])
        assert torch.equal(video, whole(vae, vector["latents"][:, :2]))


def test_the_folders_normalisation_is_used(tmp_path: Path, vae: VAE, vector: dict[str, Tensor]) -> None:
    vae.module.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"latents_mean": [0.0] * 16, "latents_std": [2.0] * 16}))
    other = VAE.load(tmp_path, torch.float32, "cpu")
    assert torch.equal(other.denormalize(vector["latents"]), 2 * vector["latents"])


def test_files_of_something_else(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    path = tmp_path / "Wan2.1_VAE.pth"
    torch.save({"blocks.0.w": torch.ones(1)}, path)
    with pytest.raises(InputError, match=r"Wan2\.1_VAE\.pth is not a Wan 2\.1 VAE: it lacks encoder\.conv_in\.weight"):
        VAE.load(path, torch.float32, "cpu")
    torch.save({name: tensor for name, tensor in weights.items() if "head.2.bias" not in name}, path)
    with pytest.raises(InputError, match=r"194 tensors 2 missing: encoder\.conv_out\.bias, decoder\.conv_out\.bias"):
        VAE.load(path, torch.float32, "cpu")
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"z_dim": 48, "is_residual": True, "patch_size": 2}))
    with pytest.raises(InputError, match=r"is a Wan 2\.2 VAE"):
        VAE.load(tmp_path, torch.float32, "cpu")


def test_latent_statistics_must_be_as_many_as_channels(weights: dict[str, Tensor]) -> None:
    config = {"base_dim": 4, "z_dim": 16, "latents_mean": [0.0] * 8}
    with pytest.raises(InputError, match="z_dim is 16, but latents_mean and latents_std have 8 and 16 entries"):
        VAE.from_state(weights, config, torch.float32, "cpu")


def test_all_194_tensors_of_the_published_file_fit_and_predict_memory() -> None:
    shapes = json.loads((DATA / "checkpoint_keys.json").read_text())["wan21_vae_pth"]
    assert len(shapes) == 194
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    vae = VAE.from_state(state, None, torch.bfloat16, "meta")
    assert sum(parameter.numel() for parameter in vae.module.parameters()) == sum(t.numel() for t in state.values())
    decoder = vae.decoder()
    latents = torch.empty(1, 3, 16, 60, 104, device="meta")
    assert decoder.decode(latents).shape == (1, 9, 3, 480, 832)
    assert decoder.decode(latents).shape == (1, 12, 3, 480, 832)
    assert abs(decoder.cache_bytes() / 2**30 - 1.76) < 0.005
    assert vae.encode(torch.empty(1, 5, 3, 480, 832, device="meta")).shape == (1, 2, 16, 60, 104)
