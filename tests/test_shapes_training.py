"""Every stage of training runs from its command, goes on after a kill as if nothing had happened, and its result loads
in the product. The runs are shortened to a few steps."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config.config import load_config
from pipeline.runtime.loading import load_transformer, load_vae, model_sizes
from pipeline.runtime.prompts import PromptEncoder
from shapes import dit_training, obedience, train
from shapes.batches import BATCHES, COMMANDS, STORIES, WINDOW, Batches, DiTRecipe, Phase
from shapes.data import Clip, as_video, make_clip, pixel_frame
from shapes.dit import Flow
from shapes.dit_training import batch_loss
from shapes.drawing import render
from shapes.export import export, native_names
from shapes.film import film
from shapes.forward import Plan
from shapes.linear import LinearCode
from shapes.optim import Average, Optimizers, orthogonalize, trapezoid
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
from shapes.runs import averaged
from shapes.schedule import random_sigmas
from shapes.stories import Stories, draw
from shapes.vae import build_vae, decode_whole, encode_whole, fit_linear_code
from shapes.world import Command, Hidden, Scene, Thing, begin
from utils.errors import InputError

KEYS = Path(__file__).parent / "data" / "checkpoint_keys.json"


@pytest.fixture(scope="module")
def code_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    fit_linear_code(folder, clips=8)
    train_text(folder, ReadingRecipe(steps=1, batch=2))
    return folder


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
def whole(code_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three stages without a pause."""
    work = tmp_path_factory.mktemp("whole")
    shutil.copy(code_folder / "linear.pt", work)
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


def test_the_linear_code_is_white_and_draws_its_components(code_folder: Path) -> None:
    code = LinearCode.load(code_folder / "linear.pt")
    latents = torch.randn(1, 3, 16, 2, 2, generator=torch.Generator().manual_seed(0))
    latents[:, 0] = 0  # the first frame stands for four
    assert torch.allclose(code.encode(code.decode(latents))[:, 1:], latents[:, 1:], atol=1e-3)


def test_half_of_the_noise_levels_are_the_sampling_steps() -> None:
    sigmas = random_sigmas((4000,), torch.Generator().manual_seed(0))
    steps = torch.tensor([1.0, 0.9375, 5 / 6, 0.625])
    share = (sigmas[:, None] - steps).abs().min(1).values.lt(1e-6).float().mean()
    assert 0.45 < share < 0.56
    assert sigmas.min() > 0 and sigmas.max() <= 1


def recipe(**changes: object) -> DiTRecipe:
    return replace(DiTRecipe(phases=(Phase(1.0, {3: 1.0}),), storyboards=1.0, batch=2), **changes)


def batches(chosen: DiTRecipe, folder: Path, rank: int = 0, workers: int = 1) -> Batches:
    return Batches(chosen, LinearCode.load(folder / "linear.pt"), trained_text_encoder(folder), rank, workers)


@pytest.mark.parametrize("own", [0.0, 1.0])
def test_the_loss_reaches_all_weights(own: float, code_folder: Path) -> None:
    (batch, other) = batches(recipe(own_history=own, own_from=0.0), code_folder)[0]
    assert batch.plan == Plan(1, prefix=6) and batch.redraw == bool(own) and batch.share == other.share == 0.5
    flow = Flow()
    with torch.no_grad():
        flow.model.head.head.weight.normal_(0, 0.1)  # it begins at zero, and nothing behind it would learn
    torch.autograd.backward(batch_loss(flow, None, batch))
    grads = {name: p.grad for name, p in flow.named_parameters()}
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads.values())


@pytest.mark.parametrize("kind", [3, COMMANDS, STORIES])
def test_a_step_is_computed_where_the_model_is(kind: int, code_folder: Path) -> None:
    """On the meta device, whose tensors meet no others, as little as a GPU's do."""
    there = torch.device("meta")
    flow, teacher = Flow().to(there), Flow().to(there)
    named = dict(flow.named_parameters())
    phases = (Phase(1.0, {kind: 1.0}),)
    chosen = recipe(phases=phases, storyboards=0.0, own_history=1.0, own_from=0.0, distill_from=0.5)
    code, text = LinearCode.load(code_folder / "linear.pt"), trained_text_encoder(code_folder)
    stories = Stories(code, text, part=0, batch=2)
    for step in range(0, chosen.steps, chosen.steps // 2):
        parts = batches(chosen, code_folder)[step] or [stories.next(Flow().model, step)]
        for part in parts:
            loss = batch_loss(flow, teacher, part.to(there))
            torch.autograd.backward(loss)
            assert loss.device == there and all(p.grad is not None for p in named.values())
    matrices, rest = ([p for p in named.values() if (p.ndim == 2) == flat] for flat in (True, False))
    Optimizers(matrices, rest, 0.1, 0.1).step(1.0)
    Average(named, 0.9).update(named, step=3)
    past, embeds = part.history[:, :3].to(there), part.embeds.to(there)
    drawn = draw(flow.model, past, embeds, Plan(2, prefix=3, window=WINDOW), torch.Generator())
    assert drawn.device == there and drawn.shape[1] == 6


@pytest.mark.parametrize("kind", [3, COMMANDS])
def test_workers_share_a_step_without_changing_it(kind: int, code_folder: Path) -> None:
    chosen = recipe(phases=(Phase(1.0, {kind: 1.0}),), batch=4)
    alone = batches(chosen, code_folder)[5]
    shared = [part for rank in (0, 1) for part in batches(chosen, code_folder, rank, workers=2)[5]]
    for one, other in zip(alone, shared, strict=True):
        same = {name: getattr(other, name) for name in ("history", "target", "embeds")}
        assert all(torch.equal(getattr(one, name), value) for name, value in same.items())
        assert replace(one, **same) == other


def test_wide_batches_have_more_clips_and_each_clip_once(code_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[int] = []

    def noted(seed: int, index: int, *args: Any, **more: Any) -> Clip:
        numbers.append(index)
        return make_clip(seed, index, *args, **more)

    monkeypatch.setattr("shapes.batches.make_clip", noted)
    made = batches(recipe(phases=(Phase(1.0, {1: 1.0}),), batch=None, wide=2), code_folder)
    clips = 2 * BATCHES[1][0]
    assert [sum(len(part.target) for part in made[step]) for step in (4, 5)] == [clips, clips]
    assert len(set(numbers)) == len(numbers) == 2 * clips


def test_clips_of_commands_show_a_switch_and_the_frames_before_it(
    code_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Clip] = []

    def noted(*args: Any, **more: Any) -> Clip:
        made.append(make_clip(*args, **more))
        return made[-1]

    monkeypatch.setattr("shapes.batches.make_clip", noted)
    code, text = LinearCode.load(code_folder / "linear.pt"), trained_text_encoder(code_folder)
    seen: set[tuple[int, int | None]] = set()
    for step in range(12):
        made.clear()
        parts = batches(recipe(phases=(Phase(1.0, {COMMANDS: 1.0}),)), code_folder)[step]
        for clip, batch in zip(made, parts, strict=True):
            prefix, switch = batch.plan.prefix, clip.switches[-1]
            whole = code.encode(as_video(clip.video)[None])
            assert (batch.history - whole[:, switch - prefix :]).abs().max() < 1e-4
            assert torch.equal(batch.target.flatten(1, 2), batch.history[:, prefix:])
            assert batch.target.shape[1] == batch.plan.blocks
            assert torch.equal(batch.embeds, text([clip.captions[-1]]))
            assert (prefix == switch) == (batch.plan.window is None)
            seen.add((prefix, batch.plan.window))
    assert {(3, None), (WINDOW, WINDOW)} <= seen


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
        monkeypatch.setattr(obedience, "draw", lambda *_, videos=videos: code.encode(videos)[:, 3:])
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
