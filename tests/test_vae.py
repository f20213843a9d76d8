"""The VAE against the conformance vector, against Diffusers' own, and on the meta device at full size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shapes.data import as_video, make_clip
from tests.conftest import ROOT
from tests.graph_recorder import OperatorRecorder
from tests.vae_twin import twin, whole
from utils.errors import InputError
from wan.checkpoints.vae_names import to_diffusers
from wan.vae.feature_cache import FeatureCache
from wan.vae.layers import run
from wan.vae.modules import VAEConfig, VAEModule
from wan.vae.streaming import StreamingDecoder
from wan.vae.vae import VAE

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


@pytest.fixture(scope="module")
def exact(weights: dict[str, Tensor]) -> VAE:
    """As on a GPU: convolutions over time in one."""
    vae = VAE.from_state(weights, None, torch.float32, "cpu")
    vae.module.lay_out(conv3d_as_conv2d=False)
    return vae


@pytest.fixture(scope="module")
def expected(vae: VAE, vector: dict[str, Tensor]) -> Tensor:
    """The vector's video by Diffusers."""
    return whole(vae, vector["latents"])


@pytest.fixture(scope="module")
def pair(exact: VAE, vae: VAE, vector: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of two videos, the videos by Diffusers, and those by planes in one call."""
    latents = vector["latents"].repeat(2, 1, 1, 1, 1) * torch.tensor([1.0, 0.5]).view(2, 1, 1, 1, 1)
    return latents, whole(exact, latents), vae.decoder().decode(latents)


def decibel(a: Tensor, b: Tensor) -> float:
    """Peak signal to noise of videos in [-1, 1]."""
    return float(10 * torch.log10(4 / (a.float() - b.float()).square().mean()))


def in_pieces(decoder: StreamingDecoder, latents: Tensor, sizes: list[int]) -> Tensor:
    return torch.cat([decoder.decode(frame_chunk) for frame_chunk in latents.split(sizes, dim=1)], dim=1)


def test_the_sizes_are_read_off_the_tensors(vae: VAE) -> None:
    assert vae.config == VAEConfig(base_dim=4, decoder_base_dim=4)
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


def test_the_defaults_are_those_of_diffusers() -> None:
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        theirs, ours = AutoencoderKLWan(), VAEModule(VAEConfig())
    known = {name: tuple(v) if isinstance(v, list) else v for name, v in theirs.config.items()}
    assert {name: known[name] for name in VAEConfig.__dataclass_fields__} == VAEConfig().__dict__
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}


@pytest.mark.parametrize("sizes", [[6], [3, 3], [1, 1, 1, 1, 1, 1], [1, 5], [2, 3, 1]])
def test_any_blocks_give_the_bits_of_diffusers_whole_video(
    exact: VAE, vae: VAE, pair: tuple[Tensor, Tensor, Tensor], sizes: list[int]
) -> None:
    latents, theirs, at_once = pair
    assert torch.equal(in_pieces(exact.decoder(), latents, sizes), theirs)
    by_planes = in_pieces(vae.decoder(), latents, sizes)
    assert torch.equal(by_planes, at_once)
    assert (by_planes - theirs).abs().max() < 2e-5
    assert decibel(by_planes, theirs) > 120


@pytest.mark.parametrize("frame_chunk", [1, 4])
def test_what_is_kept_on_the_host_changes_no_bit(exact: VAE, vector: dict[str, Tensor], frame_chunk: int) -> None:
    latents = vector["latents"].repeat(2, 1, 1, 1, 1)
    here, away = exact.decoder(2, frame_chunk=frame_chunk), exact.decoder(2, frame_chunk=frame_chunk, on_host=True)
    assert torch.equal(in_pieces(away, latents, [2, 3, 1]), in_pieces(here, latents, [2, 3, 1]))
    assert away.cache_bytes() == here.cache_bytes() > 0


@pytest.mark.parametrize("frame_chunk", [1, 2, 4, 12])
def test_pieces_of_the_last_levels_change_nothing(
    vae: VAE, vector: dict[str, Tensor], expected: Tensor, frame_chunk: int
) -> None:
    pieces = VAE(vae.module, vae.config)
    pieces.frame_chunk = frame_chunk
    video = pieces.decoder(3).decode(vector["latents"])
    assert (video - expected).abs().max() < 2e-5


@torch.no_grad()
def test_encoding_gives_what_diffusers_does(exact: VAE, vae: VAE, vector: dict[str, Tensor]) -> None:
    pixels = vector["pixels"].float()
    theirs = exact.normalize(twin(exact).encode(pixels).latent_dist.mean.transpose(1, 2))
    assert (exact.encode(pixels.transpose(1, 2)) - theirs).abs().max() < 1e-5  # threads may share sums otherwise
    assert (vae.encode(pixels.transpose(1, 2)) - theirs).abs().max() < 2e-5


def test_first_block_9_frames_later_ones_12(vae: VAE, vector: dict[str, Tensor]) -> None:
    decoder = vae.decoder()
    assert [decoder.decode(frame_chunk).shape[1] for frame_chunk in vector["latents"].split(3, dim=1)] == [9, 12]


@pytest.mark.parametrize("frames_per_call", [2, 3, 8])
def test_several_frames_a_call_differ_by_rounding_alone(
    vae: VAE, vector: dict[str, Tensor], expected: Tensor, frames_per_call: int
) -> None:
    video = in_pieces(vae.decoder(frames_per_call), vector["latents"], [3, 3])
    assert (video - expected).abs().max() < 2e-5


def test_two_videos_at_once_do_not_mix(vae: VAE, vector: dict[str, Tensor]) -> None:
    first, second = vector["latents"], vector["latents"].flip(1)
    a, b = vae.decoder(), vae.decoder()
    pieces = [(a.decode(x), b.decode(y)) for x, y in zip(first.split(2, 1), second.split(2, 1), strict=True)]
    assert torch.equal(torch.cat([x for x, _ in pieces], 1), vae.decoder().decode(first))
    assert torch.equal(torch.cat([y for _, y in pieces], 1), vae.decoder().decode(second))


def test_a_closed_decoders_memory_serves_the_next_video(vae: VAE, vector: dict[str, Tensor]) -> None:
    expected = vae.decoder().decode(vector["latents"])
    decoder = vae.decoder()
    decoder.decode(vector["latents"].flip(1))
    used = decoder._frames
    decoder.close()
    wider, again = vae.decoder(), vae.decoder()
    assert torch.equal(again.decode(vector["latents"]), expected)
    assert again._frames is used
    again.close()
    assert wider.decode(vector["latents"].repeat(1, 1, 1, 1, 2)).shape[-1] == 96
    assert wider._frames is not used
    with pytest.raises(AssertionError, match="closed"):
        again.decode(vector["latents"])


@pytest.mark.parametrize(("tile", "recorded"), [(None, False), (None, True), (16, False)])
def test_a_decoders_memory_serves_inside_and_outside_of_inference_mode(
    tile: int | None, recorded: bool, exact: VAE, vector: dict[str, Tensor]
) -> None:
    vae = VAE(exact.module, exact.config)
    vae.module.lay_out(conv3d_as_conv2d=False)
    if recorded:
        vae.prepare(1, run, OperatorRecorder())
    for inside in (True, False, True):
        with torch.inference_mode(inside):
            decoder = vae.decoder(tile=tile)
            decoder.decode(vector["latents"][:, :2])
        decoder.decode(vector["latents"][:, 2:4])
        decoder.close()


def test_the_steady_step_compiles_without_a_break(exact: VAE, vector: dict[str, Tensor]) -> None:
    """One graph for each of the three parts, for any number of calls and videos."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = VAE(exact.module, exact.config)
    compiled.module.lay_out(conv3d_as_conv2d=False)
    compiled.prepare(2, torch.compile(run, fullgraph=True, dynamic=False, backend=counter))
    latents = vector["latents"][:, :5]
    theirs = whole(exact, latents)
    for _ in range(2):
        decoder = compiled.decoder(2)
        video = torch.cat([decoder.decode(frame_chunk) for frame_chunk in latents.split([1, 2, 2], dim=1)], dim=1)
        assert (video - theirs).abs().max() < 2e-5
    assert counter.frame_count == 3


class Rewinding(OperatorRecorder):
    """On a GPU a recording changes nothing; here the decoder's memory is put back afterwards."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        memory = [kept for history in self.frames._histories for kept in history._kept]
        before = [kept.clone() for kept in memory]
        replay = super().record(function)
        for kept, old in zip(memory, before, strict=True):
            kept.copy_(old)
        return replay


def test_recorded_steps_give_the_same_in_every_video(exact: VAE, vector: dict[str, Tensor]) -> None:
    recorder = Rewinding()
    recorded = VAE(exact.module, exact.config)
    recorded.module.lay_out(conv3d_as_conv2d=False)
    recorded.prepare(1, run, recorder)
    for latents in (vector["latents"], vector["latents"].flip(1)):
        decoder = recorded.decoder()
        first = decoder.decode(latents[:, :1])
        recorder.frames = decoder._frames
        video = torch.cat([first, decoder.decode(latents[:, 1:])], dim=1)
        decoder.close()
        assert (video - exact.decoder().decode(latents)).abs().max() < 1e-5
    assert recorder.replays == 2 * (latents.shape[1] - 1) - 1  # the first steady call was recorded


def test_history_is_zero_again_when_cleared(exact: VAE) -> None:
    layers, history = exact.module.decoder.layers()[:2], FeatureCache()
    x = torch.randn(1, 16, 1, 4, 6)
    with torch.no_grad():
        first = run(layers, x, history)
        assert not torch.equal(run(layers, x, history), first)
        history.clear()
        assert torch.equal(run(layers, x, history), first)


def test_the_video_is_clamped(vae: VAE, vector: dict[str, Tensor]) -> None:
    assert vae.decoder().decode(50 * vector["latents"]).abs().max() == 1.0


def test_the_cache_never_grows(vae: VAE, vector: dict[str, Tensor]) -> None:
    decoder = vae.decoder()
    assert decoder.cache_bytes() == 0
    sizes = []
    for frame in vector["latents"].split(1, dim=1):
        decoder.decode(frame)
        sizes.append(decoder.cache_bytes())
    assert 0 < sizes[0] == sizes[1] == sizes[-1]


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


def test_bfloat16_stays_close(weights: dict[str, Tensor], vector: dict[str, Tensor], expected: Tensor) -> None:
    half = VAE.from_state(weights, None, torch.bfloat16, "cpu")
    video = half.decoder().decode(vector["latents"])
    assert video.dtype == torch.bfloat16
    assert decibel(video, expected) > 40  # random weights; trained ones are kinder
    assert decibel(video, expected) > decibel(whole(half, vector["latents"]), expected) - 1


def test_bfloat16_of_trained_weights_is_lossless() -> None:
    """Over 50 dB against float32, on latents of a clip that looks like those it was trained on."""
    path = ROOT / "checkpoints" / "shapes" / "Wan2.1-T2V-shapes" / "Wan2.1_VAE.pth"
    exactly, half = (VAE.load(path, dtype, "cpu") for dtype in (torch.float32, torch.bfloat16))
    latents = exactly.encode(as_video(make_clip(0, 0, frames=9).video)[None])
    expected = exactly.decoder().decode(latents)
    for conv3d_as_conv2d in (True, False):  # as on a CPU, and as on a GPU
        half.module.lay_out(conv3d_as_conv2d=conv3d_as_conv2d)
        assert decibel(half.decoder().decode(latents), expected) > 55


def test_the_published_file_and_the_diffusers_folder_give_the_same(
    tmp_path: Path, weights: dict[str, Tensor], vae: VAE, vector: dict[str, Tensor]
) -> None:
    torch.save(weights, tmp_path / "Wan2.1_VAE.pth")
    twin(vae).save_pretrained(tmp_path / "vae")
    for path in (tmp_path / "Wan2.1_VAE.pth", tmp_path / "vae"):
        video = VAE.load(path, torch.float32, "cpu").decoder().decode(vector["latents"][:, :2])
        assert torch.equal(video, vae.decoder().decode(vector["latents"][:, :2]))


def test_the_folders_normalisation_is_used(tmp_path: Path, vae: VAE, vector: dict[str, Tensor]) -> None:
    twin(vae).save_pretrained(tmp_path)
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


def test_names_are_converted_as_diffusers_does() -> None:
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    state = {name: torch.empty(()) for name in json.loads((DATA / "checkpoint_keys.json").read_text())["wan21_vae_pth"]}
    theirs, ours = convert_wan_vae_to_diffusers(dict(state)), to_diffusers(state)
    assert len(ours) == 194
    assert all(ours[name] is tensor for name, tensor in theirs.items())
    assert to_diffusers(ours) == ours


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
