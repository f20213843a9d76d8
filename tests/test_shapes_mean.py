"""The mean of finished models: of the weights alone, and of models that belong together alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
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
from utils.lock import RunLock

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


def content(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def nan(value: torch.Tensor) -> torch.Tensor:
    return torch.full_like(value, float("nan"))


@pytest.mark.parametrize("part", [TRANSFORMER_FILE, VAE_FILE, TEXT_ENCODER_FILE])
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (nan, "hold infinities or NaN"),
        (lambda value: value.long(), "is of another model"),
        (lambda value: value.to(torch.float8_e4m3fn), "is of another model"),
    ],
)
def test_what_is_no_weight_gets_into_no_mean(
    part: str, changed: Callable[[torch.Tensor], torch.Tensor], said: str, another: Path, tmp_path: Path
) -> None:
    shutil.copytree(MODEL, tmp_path / MODEL.name)
    before = content(tmp_path / MODEL.name)
    read, write = (load_file, save_file) if part == TRANSFORMER_FILE else (load, save)
    weights = read(another / part)
    name = next(name for name in weights if name.endswith("weight"))
    write({**weights, name: changed(weights[name])}, another / part)  # type: ignore[dict-item,arg-type]
    with pytest.raises(InputError, match=said):
        mean.write_mean([another, tmp_path / MODEL.name], tmp_path)
    assert content(tmp_path / MODEL.name) == before


def test_weights_that_half_precision_cannot_hold_are_not_written(another: Path, tmp_path: Path) -> None:
    weights = load_file(another / TRANSFORMER_FILE)
    save_file({name: 1e8 * value.float() for name, value in weights.items()}, another / TRANSFORMER_FILE)
    with pytest.raises(InputError, match="hold infinities or NaN"):
        mean.write_mean([MODEL, another], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["google/umt5-xxl/tokenizer.json", TRANSFORMER_FILE, CONFIG_FILE])
def test_a_model_stays_where_another_cannot_be_written(file: str, another: Path, tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / MODEL.name)
    (tmp_path / MODEL.name / file).unlink()
    (tmp_path / MODEL.name / file).mkdir()
    before = content(tmp_path / MODEL.name)
    with pytest.raises(InputError, match=f"{file}: is a folder"):
        mean.write_mean([MODEL, another], tmp_path)
    assert content(tmp_path / MODEL.name) == before


def test_one_model_is_written_at_a_time(another: Path, tmp_path: Path) -> None:
    (tmp_path / MODEL.name).mkdir()
    with RunLock(tmp_path / MODEL.name / ".model.lock", "busy") as lock:
        lock.begin("process 1")
        with pytest.raises(InputError, match=r"--out: another run writes .*; wait for its end.* held by process 1"):
            mean.write_mean([MODEL, another], tmp_path)
    assert not content(tmp_path / MODEL.name)


@pytest.mark.parametrize(
    "changed",
    [lambda text: "{", lambda text: "[]", lambda text: text.replace("192", "1536")],
    ids=["no", "list", "1.3B"],
)
def test_a_description_of_another_model_is_refused(
    changed: Callable[[str], str], another: Path, tmp_path: Path
) -> None:
    file = another / CONFIG_FILE
    file.write_text(changed(file.read_text()))
    with pytest.raises(InputError, match=r"MODEL: .*config.json(:| is of another model)"):
        mean.write_mean([MODEL, another], tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"junk", b"\x80\x02]q\x00."])
def test_a_damaged_part_is_said_by_the_option_that_has_named_it(content: bytes, another: Path, tmp_path: Path) -> None:
    for file in (TRANSFORMER_FILE, VAE_FILE, TEXT_ENCODER_FILE):
        shutil.copytree(another, tmp_path / file)
        (tmp_path / file / file).write_bytes(content)
        with pytest.raises(InputError, match=rf"MODEL: .*{file} is damaged.*; give a folder that shapes.train export"):
            mean.write_mean([tmp_path / file, MODEL], tmp_path / "out")


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
