"""Training of the text encoder, before anything is drawn: it learns to read what captions say.

Wan's text encoder has read the web before its transformer was trained. This one reads the world's captions: from its
embeddings a few attentive queries, which are thrown away afterwards, must tell what is said: colours, shapes, size,
verb. Then it is frozen. Learnt together with the drawing instead, word order ("from left to right", "from right to
left", which colour comes first) was still mixed up when everything else was right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shapes.captions import NOUNS, caption, random_hidden, random_scene
from shapes.commands import is_common, random_command, sentence
from shapes.dit import TEXT_SIZES, TextEncoder
from shapes.runs import Stage, averaged_of, command_of, load, sizes_of, training_device, unfinished
from shapes.world import BACKGROUNDS, COLOURS, COMMANDS, MOTIONS, SHAPES, SIZES, SWIFT, Command, Scene, World, begin
from utils.errors import InputError

TRAIN_SEED = 41
COMMAND_SHARE = 0.6  # of the captions; the others are first ones
QUESTIONS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "verb": tuple(dict.fromkeys((*MOTIONS, *(verb for verb in COMMANDS if verb != "describe")))),
    "target": tuple(COLOURS),
    "target shape": SHAPES,
    "background": BACKGROUNDS,
    "second colour": tuple(COLOURS),
    "second shape": SHAPES,
}


@dataclass(frozen=True)
class ReadingRecipe:
    steps: int = 1500
    batch: int = 128
    lr: float = 3e-3


def sample(index: int) -> tuple[str, list[int]]:
    """Caption number `index`, and the answers to QUESTIONS: 0 where it says nothing, else 1 + the place there."""
    rng = np.random.default_rng((TRAIN_SEED, index))
    scene, hidden = random_scene(rng, held=False), random_hidden(rng)
    if rng.random() >= COMMAND_SHARE:
        text = caption(scene, rng)
        return text, answers(scene, text)
    world = begin(scene, hidden).later(int(rng.integers(90)))
    if rng.random() < 0.5:
        world = world.obey(random_command(rng, world)).later(SWIFT)
    command = random_command(rng, world, held=False)
    text = sentence(command, world, rng)
    return text, command_answers(command, world, text)


def answers(scene: Scene, text: str) -> list[int]:
    """To a first scene's caption."""
    first, second = scene.things[0], scene.things[1:]
    said = {
        "colour": first.colour,
        "shape": first.shape,
        "size": first.size if scene.motion not in ("grow", "shrink", "pass") else None,
        "verb": scene.motion,
        "target": scene.target,
        "second colour": second[0].colour if second else None,
        "second shape": second[0].shape if second else None,
    }
    return _places(said)


def command_answers(command: Command, world: World, text: str) -> list[int]:
    """To a command's sentence, which names a thing by its colour, by its shape, by both, or not at all. A whole new
    scene is answered for as a first one is."""
    if command.scene:
        return answers(command.scene, text)
    body, verb, new = world.there[command.thing], command.verb, command.new
    common = is_common(verb) or new is not None
    named = any(noun in text for noun in NOUNS[body.shape]) and not common
    said = {
        "colour": body.colour if f"{body.colour} " in text and not common else None,
        "shape": body.shape if named else None,
        "verb": verb,
        "target": command.target if verb == "turn" else None,
        "target shape": command.target if verb == "morph" else None,
        "background": command.target if verb == "background" else None,
        "second colour": new.colour if new else None,
        "second shape": new.shape if new else None,
        "size": new.size if new else None,
    }
    return _places(said)


def _places(said: Mapping[str, str | None]) -> list[int]:
    values = {name: said.get(name) for name in QUESTIONS}
    return [0 if value is None else 1 + QUESTIONS[name].index(value) for name, value in values.items()]


def trained_text_encoder(folder: Path) -> TextEncoder:
    """The frozen encoder that `train_text` has left in `folder`. Raises InputError if it has not, or not finished it:
    what learns by an encoder is lost when that goes on learning."""
    path = Stage(folder, "text", 0).path
    state = load(path)
    missing = unfinished(state)
    if missing is not None:
        raise InputError(f"{path}: {missing}; finish it first: {command_of(path)}")
    return cast(TextEncoder, averaged_of(state, path, TextEncoder()).requires_grad_(False))


class Reader(nn.Module):
    """A query for every question looks at a caption's embeddings and answers."""

    def __init__(self) -> None:
        super().__init__()
        width = TEXT_SIZES["d_model"]
        self.encoder = TextEncoder()
        self.queries = nn.Parameter(0.1 * torch.randn(len(QUESTIONS), width))
        self.heads = nn.ModuleList(nn.Linear(width, 1 + len(choices)) for choices in QUESTIONS.values())

    def forward(self, captions: list[str]) -> list[Tensor]:
        """Logits [B, choices + 1] of every question."""
        embeds, mask = self.encoder.read(captions)
        weights = (embeds @ self.queries.T).masked_fill(mask[..., None] == 0, -torch.inf)  # [B, L, questions]
        seen = weights.softmax(1).transpose(1, 2) @ embeds
        return [head(seen[:, i]) for i, head in enumerate(self.heads)]


def train_text(folder: Path, recipe: ReadingRecipe, until: int | None = None) -> nn.Module:
    """Train, or go on training; returns the encoder."""
    torch.manual_seed(TRAIN_SEED)
    device = training_device()
    reader = Reader().to(device)
    optimizer = torch.optim.Adam(reader.parameters(), recipe.lr, betas=(0.9, 0.99))
    stage = Stage(folder, "text", recipe.steps, until, sizes=sizes_of(recipe))
    state = stage.resume()
    if state is not None:
        reader.load_state_dict(cast("dict[str, Tensor]", state["reader"]))
        optimizer.load_state_dict(cast("dict[str, object]", state["optimizer"]))
    for step in range(cast(int, state["step"]) if state else 0, stage.end):
        optimizer.param_groups[0]["lr"] = recipe.lr * (1 - step / recipe.steps)
        samples = [sample(step * recipe.batch + i) for i in range(recipe.batch)]
        goals = torch.tensor([goal for _, goal in samples], device=device)
        logits = reader([text for text, _ in samples])
        loss = torch.stack([F.cross_entropy(part, goals[:, i]) for i, part in enumerate(logits)]).sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        right = torch.stack([part.argmax(1) == goals[:, i] for i, part in enumerate(logits)], 1).all(1)
        stage.after(
            step,
            {"reading": loss.item(), "all right": right.float().mean().item()},
            lambda: {
                "reader": reader.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": {name: value.detach() for name, value in reader.encoder.named_parameters()},
            },
        )
    return reader.encoder.eval()
