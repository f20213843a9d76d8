"""Training of the text encoder, before anything is drawn: it learns to read what captions say.

Wan's text encoder has read the web before its transformer was trained. This one reads the world's captions: from its
embeddings a few attentive queries, which are thrown away afterwards, must tell what is said: colours, shapes, size,
motion. Then it is frozen. Learnt together with the drawing instead, word order ("from left to right", "from right to
left", which colour comes first) was still mixed up when everything else was right.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shapes.captions import caption, later_scene, random_scene
from shapes.dit import TEXT_SIZES, TextEncoder
from shapes.runs import Stage, averaged, training_device
from shapes.world import COLOURS, MOTIONS, SHAPES, SIZES, Scene

TRAIN_SEED = 41
LATER = 0.25  # share of captions that follow another
QUESTIONS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "motion": MOTIONS,
    "target": tuple(COLOURS),
    "second colour": tuple(COLOURS),
    "second shape": SHAPES,
}


@dataclass(frozen=True)
class ReadingRecipe:
    steps: int = 1000
    batch: int = 128
    lr: float = 3e-3


def sample(index: int) -> tuple[str, list[int]]:
    """Caption number `index`, and the answers to QUESTIONS: 0 where it says nothing, else 1 + the place there."""
    rng = np.random.default_rng((TRAIN_SEED, index))
    scene, later = random_scene(rng, held=False), bool(rng.random() < LATER)
    if later:
        while scene.motion in ("pass", "turn"):
            scene = random_scene(rng, held=False)
        scene = later_scene(rng, scene)
    text = caption(scene, rng, later)
    return text, answers(scene, text)


def answers(scene: Scene, text: str) -> list[int]:
    first, second = scene.things[0], scene.things[1:]
    said = {
        "colour": first.colour if f" {first.colour} " in text else None,
        "shape": first.shape,
        "size": first.size if f" {first.colour} " in text and scene.motion not in ("grow", "shrink", "pass") else None,
        "motion": scene.motion,
        "target": scene.target,
        "second colour": second[0].colour if second else None,
        "second shape": second[0].shape if second else None,
    }
    return [0 if said[name] is None else 1 + choices.index(str(said[name])) for name, choices in QUESTIONS.items()]


def trained_text_encoder(folder: Path) -> TextEncoder:
    """The frozen encoder that `train_text` has left in `folder`. Raises FileNotFoundError if it has not."""
    path = Stage(folder, "text", 0).path
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; the first stage makes it: python -m shapes.train text")
    return cast(TextEncoder, averaged(path, TextEncoder()).requires_grad_(False))


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
    stage = Stage(folder, "text", recipe.steps, until)
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
