"""States of trainings: whole or absent, gone on with as they were begun, and what is said of those that do not fit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as serialized

from shapes import obedience, train, training_captions
from shapes.adopted import adopt_text_encoder
from shapes.batches import DiTRecipe
from shapes.dit import TRANSFORMER_FILE, Flow
from shapes.dit_training import _check
from shapes.export import export
from shapes.reading import ReadingRecipe, train_text, trained_text_encoder
from shapes.runs import Stage, fingerprint, load, save
from shapes.vae import fit_linear_code
from utils import command, files
from utils.errors import InputError
from utils.lock import RunLock

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "checkpoints" / "shapes" / "Wan2.1-T2V-shapes"


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the text encoder has been trained for a step of two."""
    folder = tmp_path_factory.mktemp("begun")
    train_text(folder, ReadingRecipe(steps=2, batch=2), until=1)
    return folder


def test_a_state_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "dit.pt"
    save({"step": 1}, path)
    with pytest.raises(AttributeError):
        save({"step": 2, "what cannot be stored": lambda: 0}, path)
    assert load(path) == {"step": 1} and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("kept", [0, 1, 300, 5000])
def test_a_damaged_state_is_said(kept: int, begun: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.pt"
    path.write_bytes((begun / "text.pt").read_bytes()[:kept])
    with pytest.raises(InputError, match=r"text.pt: is damaged( \(.+\))?; delete it") as told:
        Stage(tmp_path, "text", 2).resume()
    assert "weights_only" not in str(told.value)


@pytest.mark.parametrize("state", [None, [1], torch.ones(2), "text"])
def test_what_is_no_state_is_said(state: object, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "text.pt")
    with pytest.raises(InputError, match=r"text.pt: is damaged \(it holds a \w+\); delete it"):
        Stage(tmp_path, "text", 2).resume()


def test_a_training_that_diverges_ends_and_keeps_its_last_state(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "dit", 8, every=0)
    stage.after(0, {"loss": 1.0}, lambda: {"weights": 1})
    with pytest.raises(InputError, match=r"dit.pt: the training has diverged before step 2 \(loss nan\); .* --seed"):
        stage.after(1, {"loss": float("nan")}, lambda: {"weights": float("nan")})
    assert load(stage.path) == {"step": 1, "sizes": {}, "weights": 1}


def test_a_damaged_linear_code_is_said(tmp_path: Path) -> None:
    (tmp_path / "linear.pt").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"linear.pt: is damaged"):
        fit_linear_code(tmp_path, clips=1)


def test_nothing_learns_by_an_encoder_that_is_not_finished(begun: Path, tmp_path: Path) -> None:
    shutil.copy(begun / "text.pt", tmp_path)
    for use in (trained_text_encoder, lambda folder: export(folder, folder / "out")):
        with pytest.raises(InputError, match=r"text.pt: has 1 of 2 steps; finish it first: python -m shapes"):
            use(tmp_path)
    assert not (tmp_path / "out").exists()


WORKER = """
import multiprocessing, signal, time
from shapes.runs import end_with_parent

def work():
    end_with_parent()
    print("begun", flush=True)
    time.sleep(90)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for what a shell has started with &
    worker = multiprocessing.get_context("spawn").Process(target=work, daemon=True)
    worker.start()
    worker.join()
"""


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    """Else they would go on writing what a new run has locked."""
    program = tmp_path / "program.py"
    program.write_text(WORKER, encoding="utf-8")
    told = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, str(program)], env=told, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"begun\n"
        parent.kill()
        parent.communicate(timeout=20)  # until the worker too has let go of the pipe


def test_a_run_goes_on_with_what_it_was_begun_with(begun: Path, tmp_path: Path) -> None:
    shutil.copy(begun / "text.pt", tmp_path)
    for recipe, said in (
        (ReadingRecipe(steps=3, batch=2), r"--steps: .*text.pt was begun with --steps 2; go on with that"),
        (ReadingRecipe(steps=3, batch=4), r"--steps, --batch: .* with --steps 2 and --batch 2; go on"),
    ):
        with pytest.raises(InputError, match=said):
            train_text(tmp_path, recipe)
    older = {name: value for name, value in load(begun / "text.pt").items() if name != "sizes"}
    save(older, tmp_path / "text.pt")
    train_text(tmp_path, ReadingRecipe(steps=2, batch=4))
    assert (load(tmp_path / "text.pt")["step"], load(tmp_path / "text.pt")["sizes"]) == (2, {"steps": 2, "batch": 4})


def test_only_one_run_trains_a_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLock(tmp_path / ".text.lock", "") as lock:
        lock.begin("another")
        assert command.run(lambda: train.main(["text", "--work", str(tmp_path)]), log_format=None) == 2
    assert "error: --work: another run trains text in" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["text", "--steps", "0"], "argument --steps: expected a whole number from 1 on, got '0'"),
        (["vae", "--until", "-1"], "argument --until: expected"),
        (["text", "--start-from", "x"], "--start-from is of dit alone"),
        (["vae", "--wide", "2"], "--wide is of dit alone"),
        (["text", "--seed", "2"], "--seed is of dit alone"),
        (["export", "--steps", "2"], "--steps is of training"),
        (["export", "--no-compile"], "--no-compile is of training"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    given: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train.main([*given, "--work", str(tmp_path)])
    assert said in capsys.readouterr().err


def test_what_a_new_run_begins_with_is_looked_at_first(tmp_path: Path) -> None:
    """Before text encoder and linear code are, and before there are processes."""
    other = tmp_path / "other"
    shutil.copytree(MODEL, other, ignore=shutil.ignore_patterns("*.pth", "google", "*.safetensors"))
    file = other / "diffusion_pytorch_model.safetensors"
    for content, said in (
        (b"", r"--start-from: .*safetensors is damaged"),
        (b"\x02\0\0\0\0\0\0\0{}", r"--start-from: .* is of another model"),
        (serialized({"blocks.a.weight": torch.ones(1)}), r"--start-from: .* is of another model"),
    ):
        file.write_bytes(content)
        with pytest.raises(InputError, match=said):
            train.main(["dit", "--work", str(tmp_path), "--start-from", str(other)])
    with pytest.raises(InputError, match=r"--start-from: .*: there is no such transformer of a finished model"):
        train.main(["dit", "--work", str(tmp_path), "--start-from", str(tmp_path)])
    with pytest.raises(InputError, match=r"--until: 20 is before step 75, at which --start-from begins"):
        train.main(["dit", "--work", str(tmp_path), "--start-from", str(MODEL), "--steps", "100", "--until", "20"])


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A folder in which the transformer has been trained from a finished model."""
    adopt_text_encoder(tmp_path, MODEL)
    text = fingerprint(trained_text_encoder(tmp_path))
    state = {"step": 76, "began": 75, "average": dict(Flow().named_parameters()), "text": text}
    save({**state, "sizes": {"steps": 100}}, tmp_path / "dit.pt")
    save({"average": dict(Flow().named_parameters())}, tmp_path / "teacher.pt")
    return tmp_path


def test_what_a_run_goes_on_with_stays(trained: Path) -> None:
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    for given in (None, MODEL):
        _check(trained, DiTRecipe(steps=100), None, given)
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before
    (trained / "text.pt").unlink()
    _check(trained, DiTRecipe(steps=100), None, MODEL)
    assert (trained / "text.pt").read_bytes() == before["text.pt"]


def test_a_run_begins_without_the_teacher_of_another(trained: Path) -> None:
    (trained / "dit.pt").unlink()
    _check(trained, DiTRecipe(steps=100), None, MODEL)
    assert {path.name for path in trained.iterdir()} == {"text.pt"}


def test_what_a_run_cannot_go_on_with_is_said_before_there_are_processes(trained: Path) -> None:
    shallow = {name: value for name, value in Flow().named_parameters() if ".blocks.1." not in name}
    broken = {**dict(Flow().named_parameters()), "model.head.head.bias": torch.full((64,), float("nan"))}
    state = load(trained / "dit.pt")
    for changes, given, said in (
        ({"average": None}, [], r"dit.pt: is not of the model that is trained now; give another --work"),
        ({"average": shallow | dict.fromkeys(list(shallow), 1)}, [], r"dit.pt: is not of the model that is trained"),
        ({"average": broken}, [], r"dit.pt: the weights 'model.head.head.bias' hold infinities or NaN"),
        ({"average": shallow}, [], r"dit.pt: is not of the model that is trained now; give another --work"),
        ({"text": "another"}, [], r"text.pt: is not the text encoder by which .*dit.pt has learnt; bring that back"),
        ({"began": 0}, ["--start-from", str(MODEL)], r"--start-from: .*dit.pt was begun without it; leave it out"),
        ({}, ["--start-from", str(trained)], r"--start-from: .*: there is no such text encoder of a finished model"),
    ):
        save({**state, **changes}, trained / "dit.pt")
        with pytest.raises(InputError, match=said):
            train.main(["dit", "--work", str(trained), "--steps", "100", *given])


def test_what_does_not_belong_together_is_not_exported(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(MODEL, trained / "out" / MODEL.name)
    folder = export(trained, trained / "out")
    assert "dit.pt: has 76 of 100 steps; python -m shapes.train dit" in caplog.text
    config, before = folder / "config.json", (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    assert config.read_bytes() == (MODEL / "config.json").read_bytes()
    save({**load(trained / "dit.pt"), "text": "another"}, trained / "dit.pt")
    with pytest.raises(InputError, match=r"text.pt: is not the text encoder by which .*dit.pt has learnt; bring that"):
        export(trained, trained / "out")
    assert config.exists() and (folder / "diffusion_pytorch_model.safetensors").read_bytes() == before


def test_an_export_that_ends_early_is_no_model(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(MODEL, trained / "out" / MODEL.name)

    commit = files.commit_partial

    def killed(partial: Path, path: Path) -> None:
        if path.name == TRANSFORMER_FILE:
            raise KeyboardInterrupt
        commit(partial, path)

    monkeypatch.setattr(files, "commit_partial", killed)
    with pytest.raises(KeyboardInterrupt):
        export(trained, trained / "out")
    assert not (trained / "out" / MODEL.name / "config.json").exists()


def test_captions_are_counted_before_they_are_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        training_captions.main(["--count", "0"])
    assert "--count: expected a whole number from 1 on" in capsys.readouterr().err
    with pytest.raises(InputError, match="nowhere"):
        training_captions.main(["--out", str(tmp_path / "nowhere" / "x.txt")])


def test_the_command_that_makes_a_state_can_be_copied(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train dit --work '.*/a folder #1' makes it"):
        load(tmp_path / "a folder #1" / "dit.pt")


def test_nothing_is_exported_of_what_is_not_complete(tmp_path: Path) -> None:
    adopt_text_encoder(tmp_path, MODEL)
    with pytest.raises(InputError, match=r"dit.pt: is missing; python -m shapes.train dit --work .* makes it"):
        export(tmp_path, tmp_path / "out")
    save({"average": {"one": torch.ones(1)}}, tmp_path / "dit.pt")
    with pytest.raises(InputError, match=r"dit.pt: is not of the model that is trained now"):
        export(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_obedience_is_asked_of_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--work", str(tmp_path), "--threads", str(torch.get_num_threads())]
    assert command.run(lambda: obedience.main(given), log_format=None) == 2
    assert "text.pt: is missing; python -m shapes.train text" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        obedience.main(["--threads", "0"])
