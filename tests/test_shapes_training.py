"""Every stage of training runs from its command, goes on after a kill as if nothing had happened, and its result loads
in the product. The runs are shortened to a few steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config.config import load_config
from pipeline.runtime.loading import load_transformer, load_vae, model_sizes
from pipeline.runtime.prompts import PromptEncoder
from shapes import dit_training, obedience, train
from shapes.batches import STORIES, Batch, DiTRecipe, Phase
from shapes.data import as_video, make_clip, pixel_frame
from shapes.dit import Flow
from shapes.drawing import render
from shapes.export import export
from shapes.film import film
from shapes.forward import Plan
from shapes.linear import LinearCode
from shapes.native import native_names
from shapes.optim import orthogonalize, trapezoid
from shapes.reading import (
    QUESTIONS,
    Reader,
    ReadingRecipe,
    answers,
    command_answers,
    sample,
    train_text,
    trained_text_encoder,
)
from shapes.rollout import draw
from shapes.runs import averaged
from shapes.schedule import random_sigmas
from shapes.stories import Stories
from shapes.vae import build_vae, decode_whole, encode_whole
from shapes.world import Command, Hidden, Scene, Thing, begin
from utils.errors import InputError
from wan.transformer.model import CausalWanModel

KEYS = Path(__file__).parent / "data" / "checkpoint_keys.json"


def stage(name: str, work: Path, until: int) -> dict[str, Tensor]:
    """Run a stage of 4 steps from the command line, to step `until`; the averaged weights that it leaves."""
    arguments = [name, "--work", str(work), "--steps", "4", "--until", str(until), "--no-compile", "--batch", "2"]
    assert train.main(arguments) == 0
    return average(name, work, until)


def transformer(work: Path, until: int) -> dict[str, Tensor]:
    """As stage("dit", ...), in this process alone, where the command starts two of its own."""
    dit_training._Run(work, DiTRecipe(steps=4, batch=2, compile=False), until).train()
    return average("dit", work, until)


def average(name: str, work: Path, step: int) -> dict[str, Tensor]:
    state = torch.load(work / f"{name}.pt", weights_only=True)
    assert state["step"] == step
    average: dict[str, Tensor] = state["average"]
    return average


@pytest.fixture(scope="module")
def whole(shapes_work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three stages without a pause."""
    work = tmp_path_factory.mktemp("whole")
    shutil.copy(shapes_work / "linear.pt", work)
    for name in ("text", "vae"):
        stage(name, work, 4)
    transformer(work, 4)
    return work


@pytest.mark.parametrize("name", ["text", "vae", "dit"])
def test_a_stage_goes_on_where_it_was_killed(name: str, whole: Path, tmp_path: Path) -> None:
    for needed in {"linear.pt", "text.pt"} - {f"{name}.pt"}:
        shutil.copy(whole / needed, tmp_path)
    first = transformer(tmp_path, 2) if name == "dit" else stage(name, tmp_path, 2)
    second = stage(name, tmp_path, 4)
    # Not to the bit: rounding follows where things lie in memory, and Muon scales up the first steps' tiny gradients.
    assert distance(average(name, whole, 4), second) < 0.7 * distance(first, second)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return float(torch.stack([(a[name] - b[name]).square().sum() for name in a]).sum().sqrt())


def test_what_is_trained_loads_in_the_product(whole: Path, tmp_path: Path) -> None:
    folder = export(whole, tmp_path / "root" / "shapes")
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 12 << 20
    config = load_config("configs/shapes_demo.yaml", [f"model_root={tmp_path / 'root'}"])
    device, flow, vae = (
        torch.device("cpu"),
        averaged(whole / "dit.pt", Flow()),
        averaged(whole / "vae.pt", build_vae()),
    )
    assert isinstance(flow, Flow)
    sizes = model_sizes(config)
    model = load_transformer(config, sizes, device, torch.float32)
    for name, value in flow.model.named_parameters():
        assert torch.allclose(model.get_parameter(name), value, atol=2e-3), name
    prompt = "A red ball moves to the right."
    embeds = PromptEncoder(config, device, sizes.text_len)(prompt)
    expected = trained_text_encoder(whole)([prompt])[0, : len(embeds)]
    assert (embeds - expected).abs().max() < 0.1  # the file is bf16
    loaded = load_vae(config, device, torch.float32)
    latents = torch.randn(1, 2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        video = decode_whole(vae, latents.transpose(1, 2)).transpose(1, 2).clamp(-1, 1)
        again = encode_whole(vae, video.transpose(1, 2)).transpose(1, 2)
    assert (loaded.decoder().decode(latents) - video).abs().max() < 2e-2
    assert (loaded.encode(video) - again).abs().max() < 2e-2


def test_the_vae_has_the_published_names() -> None:
    published = json.loads(KEYS.read_text(encoding="utf-8"))["wan21_vae_pth"]
    assert native_names(build_vae().state_dict()).keys() == published.keys()


def test_the_linear_code_is_white_and_draws_its_components(shapes_work: Path) -> None:
    code = LinearCode.load(shapes_work / "linear.pt")
    latents = torch.randn(1, 3, 16, 2, 2, generator=torch.Generator().manual_seed(0))
    latents[:, 0] = 0  # the first frame stands for four
    assert torch.allclose(code.encode(code.decode(latents))[:, 1:], latents[:, 1:], atol=1e-3)


def test_half_of_the_noise_levels_are_the_sampling_steps() -> None:
    sigmas = random_sigmas((4000,), torch.Generator().manual_seed(0))
    steps = torch.tensor([1.0, 0.9375, 5 / 6, 0.625])
    share = (sigmas[:, None] - steps).abs().min(1).values.lt(1e-6).float().mean()
    assert 0.45 < share < 0.56
    assert sigmas.min() > 0 and sigmas.max() <= 1


def test_how_far_commands_are_obeyed(whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """A model that draws the film is no way from it; one that hears nothing draws the other one."""
    clips = [make_clip(1, i, (3,), pixel_frame(9)) for i in range(3)]
    code = LinearCode.load(whole / "linear.pt")
    films = {
        "told": [clip.film for clip in clips],
        "untold": [film(clip.scene, clip.hidden, clip.frames) for clip in clips],
    }
    for name, place in (("told", 0), ("untold", 1)):
        videos = torch.stack([as_video(render(one)) for one in films[name]])
        monkeypatch.setattr(obedience, "draw", lambda *_, videos=videos: [code.encode(videos)[:, 3:]])
        found = obedience.errors(Flow().model, code, trained_text_encoder(whole), clips, 0)
        assert found[place].max() == 0 and torch.equal(found[1 - place], found[2]) and found[2].min() > 0
    monkeypatch.undo()
    threads = torch.get_num_threads()
    assert obedience.main(["--work", str(whole), "--clips", "2", "--switch", "3", "--threads", str(threads)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["all", "2"]
    with pytest.raises(SystemExit):
        obedience.main(["--work", str(whole), "--switch", "4"])


def test_muon_makes_updates_orthogonal() -> None:
    update = torch.randn(24, 60, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(update))
    assert values.min() > 0.5 and values.max() < 1.4


def test_the_learning_rate_rises_stays_and_falls() -> None:
    shares = [trapezoid(step, 1000) for step in range(1000)]
    assert shares[0] < 0.05 and shares[500] == 1 and shares[-1] < 0.01 and min(shares) > 0


def said(places: list[int]) -> dict[str, str]:
    """What the answers to QUESTIONS say."""
    pairs = zip(QUESTIONS.items(), places, strict=True)
    return {name: choices[place - 1] for (name, choices), place in pairs if place}


def test_what_a_caption_says() -> None:
    scene = Scene((Thing("disc", "red", "large"),), "turn", "blue")
    wanted = {"colour": "red", "shape": "disc", "size": "large", "verb": "turn", "target": "blue"}
    assert said(answers(scene, "A large red ball turns blue.")) == wanted


@pytest.mark.parametrize(
    ("command", "text", "wanted"),
    [
        (Command("turn", target="blue"), "It turns blue.", {"verb": "turn", "target": "blue"}),
        (
            Command("morph", target="cross"),
            "The red ball becomes a cross",
            {"verb": "morph", "colour": "red", "shape": "disc", "target shape": "cross"},
        ),
        (Command("shrink"), "now the circle shrinks", {"verb": "shrink", "shape": "disc"}),
        (Command("reverse"), "The other way.", {"verb": "reverse"}),
        (
            Command("background", target="dark"),
            "the background turns dark",
            {"verb": "background", "background": "dark"},
        ),
        (
            Command("bring", new=Thing("square", "green", "small")),
            "A small green box appears",
            {"verb": "bring", "size": "small", "second colour": "green", "second shape": "square"},
        ),
        (
            Command("describe", target="up", new=Thing("square", "green", "small")),
            "Then a small green box rises.",
            {"verb": "up", "size": "small", "colour": "green", "shape": "square"},
        ),
    ],
)
def test_what_a_sentence_says(command: Command, text: str, wanted: dict[str, str]) -> None:
    world = begin(Scene((Thing("disc", "red"),), "right"), Hidden())
    assert said(command_answers(command, world, text)) == wanted


def test_the_text_encoder_learns_to_read(tmp_path: Path) -> None:
    """In seconds its answers get much better than those that know how often everything is."""
    assert sample(3) == sample(3) != sample(4)
    train_text(tmp_path, ReadingRecipe(steps=60, batch=32))
    encoder = trained_text_encoder(tmp_path)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    state = torch.load(tmp_path / "text.pt", weights_only=True)
    reader = Reader()
    reader.load_state_dict(state["reader"])
    texts, goals = zip(*(sample(10_000 + i) for i in range(200)), strict=True)
    with torch.no_grad():
        logits = reader(list(texts))
    right = [(part.argmax(1) == torch.tensor(goals)[:, i]).float().mean().item() for i, part in enumerate(logits)]
    assert right[list(QUESTIONS).index("shape")] > 0.7 and sum(right) / len(right) > 0.75


def test_the_transformer_wants_an_encoder_that_reads(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"text.pt: is missing; python -m shapes.train text --work .* makes it"):
        train.main(["dit", "--work", str(tmp_path), "--steps", "1"])


def test_the_averaged_weights_draw_for_a_training(
    shapes_work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("text.pt", "linear.pt"):
        shutil.copy(shapes_work / name, tmp_path)
    drawers = []

    def told(stories: Stories, model: CausalWanModel, step: int) -> Batch:
        drawers.append(model)
        return tell(stories, model, step)

    def lost(flow: Flow, teacher: Flow | None, batch: Batch, drawer: CausalWanModel | None = None) -> Tensor:
        drawers.append(drawer)
        return batch_loss(flow, teacher, batch, drawer)

    tell, batch_loss = Stories.next, dit_training.batch_loss
    monkeypatch.setattr(Stories, "next", told)
    monkeypatch.setattr(dit_training, "batch_loss", lost)
    recipe = DiTRecipe(steps=1, batch=2, compile=False, phases=(Phase(1.0, {STORIES: 1.0}),))
    run = dit_training._Run(tmp_path, recipe)
    run.train()
    assert len(drawers) == 4 and all(drawer is run._drawer for drawer in drawers)
    held = {f"model.{name}": value.data_ptr() for name, value in run._drawer.named_parameters()}
    assert held == {name: value.data_ptr() for name, value in run._average.values.items()}
    finished, generator = Flow(), torch.Generator().manual_seed(0)
    finished.load_state_dict(run._average.values)
    past, words = torch.randn(1, 3, 16, 4, 4, generator=generator), torch.randn(1, 48, 64, generator=generator)
    drawn, same = (
        draw(model, past, words, Plan(1, prefix=3), torch.Generator().manual_seed(1))[-1]
        for model in (run._drawer, finished.model)
    )
    assert torch.equal(drawn, same)
