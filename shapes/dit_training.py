"""Training of the causal transformer, and of the text encoder with it, on latents of the linear code.

Flow matching with block-causal teacher forcing (`shapes.forward`). Half of the noise levels are exactly those of the
four sampling steps. The history is what the product will have: a little noisy, and for a share of the steps drawn by
the model itself, in one step from noised truth, so that its own blur does no harm. Some batches are storyboards. Near
the end the blocks of short clips are distilled (`shapes.distill`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from shapes.data import BLOCK, as_video, make_clip, pixel_frame
from shapes.distill import distillation_loss
from shapes.dit import TextToFlow
from shapes.linear import LinearCode
from shapes.optim import Average, Optimizers, trapezoid
from shapes.runs import Stage, averaged, save
from shapes.schedule import HISTORY_NOISE, SCHEDULE, add_noise, random_sigmas
from shapes.vae import fit_linear_code

TRAIN_SEED, STEP_SEED = 21, 22
MOST_DISTILLED = 3  # blocks of a clip


@dataclass(frozen=True)
class Phase:
    """To the share `until` of all steps, batches have as many blocks as their weights say: {blocks: weight}."""

    until: float
    blocks: dict[int, float]


# Blocks of a batch's clips -> clips, noisy copies. A first block has nothing before it and is the hardest: short
# clips show many of them.
BATCHES = {1: (16, 4), 3: (8, 2), 7: (4, 2)}


@dataclass(frozen=True)
class DiTRecipe:
    """What is trained on, from the first block's picture to whole videos.

    All that changes on the way does so at a share of `steps`. To `plain_until` captions leave nothing open but the
    background. `storyboards`: share of batches of more than one block with a prompt switch. `own_history`: share of
    batches, from `own_from` on, whose history the model has drawn itself. From `distill_from` on clips of few blocks
    are distilled. `batch` instead of the numbers of clips in BATCHES.
    """

    steps: int = 6000
    phases: tuple[Phase, ...] = (
        Phase(0.25, {1: 0.7, 3: 0.3}),
        Phase(0.75, {1: 0.4, 3: 0.4, 7: 0.2}),
        Phase(1.0, {1: 0.3, 3: 0.25, 7: 0.45}),
    )
    plain_until: float = 0.16
    storyboards: float = 0.2
    own_history: float = 0.5
    own_from: float = 0.75
    distill_from: float = 0.75
    muon_lr: float = 0.02
    adam_lr: float = 2e-3
    decay: float = 0.997
    batch: int | None = None

    def blocks(self, step: int, rng: np.random.Generator) -> int:
        """How many blocks the clips of this step have."""
        weights = next(phase.blocks for phase in self.phases if step < phase.until * self.steps)
        return int(rng.choice(list(weights), p=list(weights.values())))


@dataclass(frozen=True)
class Batch:
    """Latents [B, K, n, 16, h, w] with the captions of the blocks from `switch` on, to be noised `copies` times."""

    latents: Tensor
    captions: list[str]
    switch: int
    copies: int

    def split(self, parts: int) -> list[Batch]:
        """Its clips in `parts` batches (fewer if there are not so many clips)."""
        cuts = np.linspace(0, len(self.captions), min(parts, len(self.captions)) + 1).astype(int).tolist()
        return [
            Batch(self.latents[i:j], self.captions[i:j], self.switch, self.copies) for i, j in itertools.pairwise(cuts)
        ]


def make_batch(step: int, recipe: DiTRecipe, code: LinearCode, rng: np.random.Generator) -> Batch:
    blocks = recipe.blocks(step, rng)
    size, copies = BATCHES[blocks]
    size = recipe.batch or size
    switch = 0
    if blocks > 1 and rng.random() < recipe.storyboards:
        switch = int(rng.integers(min(2, blocks - 1), min(5, blocks)))
    first = step * max(clips for clips, _ in BATCHES.values())  # no clip is seen twice
    frames = pixel_frame(blocks * BLOCK)
    plain = step < recipe.plain_until * recipe.steps
    clips = [make_clip(TRAIN_SEED, first + i, BLOCK * switch or None, frames, plain=plain) for i in range(size)]
    latents = code.encode(torch.stack([as_video(clip.video) for clip in clips]))
    latents = latents.view(size, blocks, BLOCK, *latents.shape[2:])
    return Batch(latents, [clip.captions[-1] for clip in clips], switch, copies)


def training_loss(nets: TextToFlow, batch: Batch, own_history: bool, generator: torch.Generator) -> Tensor:
    """Mean square error of the flow over all noisy blocks."""
    x0, switch = batch.latents, batch.switch
    embeds = nets.embeds(batch.captions)
    history = x0
    if own_history:
        history = _redrawn(nets, batch, embeds.detach(), generator)
    level = HISTORY_NOISE * torch.rand(x0.shape[:2], generator=generator)
    history = add_noise(history, torch.randn(x0.shape, generator=generator), level)
    target = x0[:, None, switch:].expand(-1, batch.copies, -1, -1, -1, -1, -1)
    noise = torch.randn(target.shape, generator=generator)
    sigma = random_sigmas(target.shape[:3], generator)
    with torch.autocast("cpu", torch.bfloat16):
        flow = nets.flow(history, add_noise(target, noise, sigma), 1000 * sigma, embeds, switch)
    return torch.nn.functional.mse_loss(flow, noise - target)


Loss = Callable[[Batch, torch.Generator], Tensor]


def backward(nets: nn.Module, batch: Batch, loss_of: Loss, seed: int, pool: Executor) -> float:
    """Leave the gradient of the batch's loss in the parameters; returns the loss.

    Halves of the batch run beside each other, each on one core: two threads in every operation would wait for each
    other all the time, above all on a machine with other work. The halves are always the same, whoever computes them.
    """
    parameters = list(nets.parameters())

    def part(index: int, clips: Batch) -> tuple[float, tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(seed + index)
        loss = loss_of(clips, generator) * (len(clips.captions) / len(batch.captions))
        return loss.item(), torch.autograd.grad(loss, parameters)

    results = list(pool.map(part, itertools.count(), batch.split(2)))
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.stack([grads[number] for _, grads in results]).sum(0)
    return sum(loss for loss, _ in results)


@torch.no_grad()
def _redrawn(nets: TextToFlow, batch: Batch, embeds: Tensor, generator: torch.Generator) -> Tensor:
    """The batch's latents as the model draws them in one step from noised truth, each block over the true ones."""
    x0 = batch.latents
    noise = torch.randn(x0[:, None].shape, generator=generator)
    choice = torch.randint(1, len(SCHEDULE), (x0.shape[0], 1, x0.shape[1]), generator=generator)
    sigma = torch.tensor(SCHEDULE.sigmas)[choice]
    noisy = add_noise(x0[:, None], noise, sigma)
    switch = batch.switch
    with torch.autocast("cpu", torch.bfloat16):
        flow = nets.flow(x0, noisy[:, :, switch:], 1000 * sigma[:, :, switch:], embeds, switch)
    drawn = noisy[:, 0, switch:] - sigma[:, 0, switch:, None, None, None, None] * flow[:, 0]
    return torch.cat((x0[:, :switch], drawn), dim=1)


def teacher_forced(nets: TextToFlow, own_history: bool) -> Loss:
    return lambda batch, generator: training_loss(nets, batch, own_history, generator)


def distilled(nets: TextToFlow, teacher: TextToFlow) -> Loss:
    def loss_of(batch: Batch, generator: torch.Generator) -> Tensor:
        copies = batch.copies // 2  # the solver's passes cost more than the others
        embeds, theirs = nets.embeds(batch.captions), teacher.embeds(batch.captions)
        return distillation_loss(nets.flow, teacher.flow, batch.latents, copies, embeds, theirs, generator)

    return loss_of


def frozen_teacher(folder: Path, average: Average) -> TextToFlow:
    """The averaged models as they were when distillation began; kept in a file for runs that are resumed."""
    path = folder / "teacher.pt"
    if not path.is_file():
        save({"average": average.values}, path)
    teacher = averaged(path, TextToFlow())
    return cast(TextToFlow, teacher.requires_grad_(False))


def train_dit(folder: Path, recipe: DiTRecipe, until: int | None = None, workers: int = 2) -> TextToFlow:
    """Train, or go on training; returns the models with averaged weights."""
    torch.manual_seed(TRAIN_SEED)
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    code, nets = fit_linear_code(folder), TextToFlow()
    stage = Stage(folder, "dit", recipe.steps, until)
    named = dict(nets.named_parameters())
    matrices = [
        p for name, p in named.items() if p.ndim > 1 and name.startswith(("model.blocks", "text.encoder.block"))
    ]
    matrices = [p for p in matrices if p.ndim == 2 and min(p.shape) > 8]
    chosen = {id(p) for p in matrices}
    rest = [p for p in named.values() if id(p) not in chosen]
    optimizers = Optimizers(matrices, rest, recipe.muon_lr, recipe.adam_lr)
    average = Average(named, recipe.decay)
    state = stage.resume()
    start = 0
    if state is not None:
        nets.load_state_dict(cast("dict[str, Tensor]", state["nets"]))
        average.values = cast("dict[str, Tensor]", state["average"])
        optimizers.load_state_dict(cast("list[dict[str, object]]", state["optimizers"]))
        start = cast(int, state["step"])
    teacher: TextToFlow | None = None
    for step in range(start, stage.end):
        rng = np.random.default_rng((STEP_SEED, step))
        batch = make_batch(step, recipe, code, rng)
        own = step >= recipe.own_from * recipe.steps and rng.random() < recipe.own_history
        short = batch.latents.shape[1] <= MOST_DISTILLED and not batch.switch
        distill = step >= recipe.distill_from * recipe.steps and short
        if distill and teacher is None:
            teacher = frozen_teacher(folder, average)
        loss_of = distilled(nets, teacher) if distill and teacher is not None else teacher_forced(nets, own)
        loss = backward(nets, batch, loss_of, int(rng.integers(1 << 40)), pool)
        optimizers.step(trapezoid(step, recipe.steps))
        average.update(named, step)
        stage.after(
            step,
            {"distillation" if distill else f"loss on {batch.latents.shape[1]} blocks": loss},
            lambda: {
                "nets": nets.state_dict(),
                "average": average.values,
                "optimizers": optimizers.state_dict(),
            },
        )
    with torch.no_grad():
        for name, value in average.values.items():
            named[name].copy_(value)
    return nets.eval()
