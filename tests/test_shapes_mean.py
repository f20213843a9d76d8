"""The mean of finished models: of the weights alone, and of models that belong together alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shapes import mean
from shapes.batches import DiTRecipe
from shapes.dit import CONFIG_FILE, TEXT_ENCODER_FILE, TRANSFORMER_FILE, VAE_FILE
from shapes.dit_training import _check
from shapes.runs import load, save
from utils import command
from utils.errors import InputError

MODEL = Path(__file__).parents[1] / "checkpoints" / "shapes" / "Wan2.1-T2V-shapes"


@pytest.fixture
def another(tmp_path: Path) -> Path:
    """A model with other weights."""
    folder = tmp_path / "another"
    shutil.copytree(MODEL, folder)
    weights = load_file(MODEL / TRANSFORMER_FILE)
    save_file({name: 2 * value + 1 for name, value in weights.items()}, folder / TRANSFORMER_FILE)
    return folder


def test_the_mean_is_of_every_tensor_and_all_else_the_first_models(another: Path, tmp_path: Path) -> None:
    written = mean.write_mean([MODEL, another, MODEL, MODEL], tmp_path)
    assert {file.relative_to(written) for file in written.rglob("*")} == {
        file.relative_to(MODEL) for file in MODEL.rglob("*")
    }
    found, had = load_file(written / TRANSFORMER_FILE), load_file(MODEL / TRANSFORMER_FILE)
    assert found.keys() == had.keys()
    for name, value in found.items():
        both = had[name].float(), load_file(another / TRANSFORMER_FILE)[name].float()
        assert torch.equal(value, ((3 * both[0] + both[1]) / 4).half()), name
    for name in (TEXT_ENCODER_FILE, VAE_FILE):
        pairs = load(written / name), load(MODEL / name)
        assert pairs[0].keys() == pairs[1].keys()
        assert all(torch.equal(pairs[0][key], pairs[1][key]) for key in pairs[0])  # type: ignore[arg-type]
    for file in (CONFIG_FILE, "google/umt5-xxl/tokenizer.json"):
        assert (written / file).read_bytes() == (MODEL / file).read_bytes()


def test_a_model_can_become_its_mean_with_others(another: Path, tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / MODEL.name)
    name = "head.head.bias"
    both = [load_file(folder / TRANSFORMER_FILE)[name].float() for folder in (MODEL, another)]
    given = [str(tmp_path / MODEL.name), str(another), "--out", str(tmp_path)]
    assert command.run(lambda: mean.main(given), log_format=None) == 0
    assert torch.equal(load_file(tmp_path / MODEL.name / TRANSFORMER_FILE)[name], (sum(both) / 2).half())


def test_models_that_do_not_belong_together_have_no_mean(another: Path, tmp_path: Path) -> None:
    weights = load(another / TEXT_ENCODER_FILE)
    save({name: value + 1 for name, value in weights.items()}, another / TEXT_ENCODER_FILE)  # type: ignore[operator]
    with pytest.raises(InputError, match=r"MODEL: .*another has another text encoder than .*; leave one of them out"):
        mean.write_mean([MODEL, another], tmp_path / "out")
    with pytest.raises(InputError, match=r"MODEL: .*nowhere.*: there is no such text encoder of a finished model"):
        mean.write_mean([MODEL, tmp_path / "nowhere"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_first_models_vae_is_looked_at_first(another: Path, tmp_path: Path) -> None:
    weights = load(another / VAE_FILE)
    weights.pop("conv2.bias")
    for content in ({"x": torch.ones(1)}, {**weights, "conv2.bias": "no tensor"}):
        save(content, another / VAE_FILE)
        with pytest.raises(InputError, match=r"MODEL: .*Wan2.1_VAE.pth is of another model; give a folder that"):
            mean.write_mean([another, MODEL], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_model_is_no_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        mean.main([str(MODEL), "--out", str(tmp_path)])
    assert "Wan2.1-T2V-shapes alone; give two or more" in capsys.readouterr().err


def test_a_model_of_two_halves_is_taken_by_nobody(another: Path, tmp_path: Path) -> None:
    (another / CONFIG_FILE).unlink()  # as an export that was killed leaves it
    said = r"config.json: there is no such description of a finished model"
    with pytest.raises(InputError, match=f"MODEL: .*{said}"):
        mean.write_mean([MODEL, another], tmp_path / "out")
    with pytest.raises(InputError, match=f"--start-from: .*{said}"):
        _check(tmp_path / "work", DiTRecipe(), None, another)
    assert not (tmp_path / "out").exists() and not (tmp_path / "work").exists()
