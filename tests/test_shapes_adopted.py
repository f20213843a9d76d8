"""What a training takes over from the finished model that it begins with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from shapes.adopted import FRAMES, adopt_linear_code, adopt_text_encoder
from shapes.data import as_video, make_clip, pixel_frame
from shapes.dit import CONFIG_FILE, TEXT_ENCODER_FILE, VAE_FILE
from shapes.linear import LinearCode, patches
from shapes.native import native_text_encoder
from shapes.reading import ReadingRecipe, train_text, trained_text_encoder
from shapes.runs import save
from shapes.tokenizer import TOKENIZER
from utils.errors import InputError
from wan.vae.vae import VAE

MODEL = Path(__file__).parents[1] / "checkpoints" / "shapes" / "Wan2.1-T2V-shapes"


def test_a_linear_code_is_found_by_what_it_encodes() -> None:
    videos = torch.stack([as_video(make_clip(105, i, frames=pixel_frame(FRAMES)).video) for i in range(6)])
    code = LinearCode.fit(patches(videos).flatten(0, 3))
    latents = code.encode(videos)
    flat = latents.permute(0, 1, 3, 4, 2).flatten(0, 3)
    found = LinearCode.nearest(patches(videos).flatten(0, 3), 2 * flat + 1)
    assert (found.encode(videos) - (2 * latents + 1)).square().mean() < 1e-3
    assert (found.decode(2 * latents + 1) - code.decode(latents)).square().mean() < 1e-5


def test_a_finished_models_linear_code_is_read_off_its_vae(tmp_path: Path) -> None:
    vae = VAE.load(MODEL / VAE_FILE, torch.float32, "cpu")
    adopt_linear_code(tmp_path, MODEL, clips=4)
    code = LinearCode.load(tmp_path / "linear.pt")
    video = as_video(make_clip(106, 0, (6,), pixel_frame(FRAMES)).video)[None]
    latents = vae.encode(video)
    assert 0.7 < latents.square().mean() < 1.5
    assert (code.encode(video) - latents).square().mean() < 0.1
    assert (code.decode(latents).clamp(-1, 1) - video).square().mean() < 0.03
    before = (tmp_path / "linear.pt").read_bytes()
    adopt_linear_code(tmp_path, MODEL)  # as where a run is resumed
    assert (tmp_path / "linear.pt").read_bytes() == before


def test_without_a_vae_there_is_no_code_to_take_over(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--start-from: .*: there is no such VAE of a finished model"):
        adopt_linear_code(tmp_path, tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_finished_models_words_must_be_those_of_captions(tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(MODEL, other, ignore=shutil.ignore_patterns("*.safetensors"))
    words = other / TOKENIZER / "tokenizer.json"
    words.write_text(words.read_text(encoding="utf-8").replace("triangle", "trilateral"), encoding="utf-8")
    with pytest.raises(InputError, match=r"--start-from: .*tokenizer.json has other words than captions have now"):
        adopt_text_encoder(tmp_path, other)
    words.write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"--start-from: .*tokenizer.json: is not a JSON file"):
        adopt_text_encoder(tmp_path, other)
    assert not (tmp_path / "text.pt").exists()


def test_a_finished_models_text_encoder_is_taken_over_as_it_is(tmp_path: Path) -> None:
    adopt_text_encoder(tmp_path, MODEL)
    adopt_text_encoder(tmp_path, MODEL)  # as where the first step was not reached
    found = native_text_encoder(trained_text_encoder(tmp_path).umt5)
    finished = torch.load(MODEL / TEXT_ENCODER_FILE, weights_only=True)
    assert found.keys() == finished.keys() and all(torch.equal(found[name], finished[name].float()) for name in found)
    with pytest.raises(InputError, match=r"text.pt: is of a finished model that --start-from has named"):
        train_text(tmp_path, ReadingRecipe(steps=2, batch=2))


def test_a_text_encoder_that_has_been_trained_stays(tmp_path: Path) -> None:
    train_text(tmp_path, ReadingRecipe(steps=2, batch=2), until=1)
    before = (tmp_path / "text.pt").read_bytes()
    with pytest.raises(InputError, match=r"--start-from: .*text.pt is another text encoder than .*; give another"):
        adopt_text_encoder(tmp_path, MODEL)
    assert (tmp_path / "text.pt").read_bytes() == before


def test_a_finished_models_text_encoder_that_does_not_fit_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--start-from: .*: there is no such text encoder of a finished model"):
        adopt_text_encoder(tmp_path, tmp_path)
    shutil.copytree(MODEL / TOKENIZER, tmp_path / TOKENIZER)
    shutil.copy(MODEL / CONFIG_FILE, tmp_path)
    save({"norm.weight": torch.ones(64)}, tmp_path / TEXT_ENCODER_FILE)
    with pytest.raises(InputError, match=r"--start-from: .* is of another model"):
        adopt_text_encoder(tmp_path, tmp_path)
    assert not (tmp_path / "text.pt").exists()
