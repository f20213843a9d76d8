"""Training of the causal transformer on latents of the linear code and on what the frozen text encoder makes of
captions.

Flow matching with block-causal teacher forcing (`shapes.forward`). At least half of the noise levels are exactly those
of the four sampling steps. The history is what the product will have: a little noisy, and for a share of the steps
drawn by the model itself, so that its own blur does no harm: after a prompt switch as the product draws
(`shapes.rollout`), in a first scene in one step from noised truth. What was before the switch has often drifted
(`shapes.drift`). One of the noisy copies of a block is often no noised truth, but the model's own answer after some
sampling steps, noised again: the later steps have to mend what the first ones have made, not to believe it. Once first
videos are known most batches show the blocks right after a prompt switch alone, since there is the one place where a
command can be learnt: after them history tells what to draw. Others are stories, whose history the model has drawn over
many blocks (`shapes.stories`). Near the end the blocks of short clips are distilled (`shapes.distill`).

Two processes share a step, each on one core: two threads in every operation would wait for each other all the time,
and so small a model keeps a GPU less busy than the process that feeds it. A batch is always cut into the same two
parts, whoever computes them.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import ProcessExitedException, spawn
from torch.utils.data import DataLoader

from shapes.adopted import adopt_linear_code, adopt_text_encoder
from shapes.batches import PARTS, TRAIN_SEED, Batch, Batches, DiTRecipe
from shapes.distill import distillation_loss
from shapes.dit import Flow
from shapes.finished import finished_transformer
from shapes.forward import Plan
from shapes.optim import Average, Optimizers, trapezoid
from shapes.reading import trained_text_encoder
from shapes.rollout import draw_against
from shapes.runs import (
    Stage,
    averaged,
    check_text,
    end_with_parent,
    fast_precision,
    fingerprint,
    log_to_stdout,
    save,
    sizes_of,
    training_device,
)
from shapes.schedule import (
    SCHEDULE,
    a_little_noisy,
    add_noise,
    end_of,
    flow_to,
    noise_like,
    random_sigmas,
    random_steps,
)
from shapes.stories import Stories
from shapes.vae import fit_linear_code
from utils import command
from utils.errors import InputError, ToldElsewhere
from wan.transformer.model import CausalWanModel

TEACHER = "teacher.pt"  # in the folder of a training
TOLD = 2  # status of a process that has said what the user has to mend
LOADERS = 6  # of each process, which make clips for a GPU: it is faster than one of them


def batch_loss(flow: Flow, teacher: Flow | None, batch: Batch, drawer: CausalWanModel | None = None) -> Tensor:
    """The mean square error of the flow over all noisy blocks, times the batch's share of the step. `drawer`: draws
    what is drawn block by block, instead of the flow itself."""
    generator = torch.Generator().manual_seed(batch.seed)
    if not batch.distilled:
        return batch.share * teacher_forcing_loss(flow, batch, generator, drawer or flow.model)
    assert teacher is not None
    copies = 2 * (batch.copies // 2)
    return batch.share * distillation_loss(flow, teacher, batch.target, copies, batch.embeds, generator)


def teacher_forcing_loss(flow: Flow, batch: Batch, generator: torch.Generator, drawer: CausalWanModel) -> Tensor:
    if batch.redraw:
        batch = _redrawn(flow, batch, generator, drawer)
    history = a_little_noisy(batch.history, generator)
    target = batch.target[:, None]
    clean = target.repeat(1, batch.copies, 1, 1, 1, 1, 1)
    noise = noise_like(clean, generator)
    sigma = random_sigmas(clean.shape[:3], generator).to(target.device)
    if batch.early:
        sigma[:, 0] = random_steps(sigma[:, 0].shape, generator, last=1)
    if batch.answered or batch.answers is not None:
        step = int(torch.randint(1, len(SCHEDULE), (), generator=generator))
        made = _answers(flow, batch, history, step, generator) if batch.answers is None else batch.answers[step - 1]
        clean[:, -1], sigma[:, -1] = made, SCHEDULE.sigmas[step]
    noisy = add_noise(clean, noise, sigma)
    with fast_precision(target.device):
        found = flow(history, noisy, 1000 * sigma, batch.embeds, batch.plan)
    goal = flow_to(target, noisy, sigma)
    first = 0 if batch.first_block else 1
    return torch.nn.functional.mse_loss(found[:, :, first:], goal[:, :, first:])


@torch.no_grad()
def _answers(flow: Flow, batch: Batch, history: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """What the model makes of the blocks in its first sampling steps [B, K, n, C, h, w], each over its history."""
    clean = torch.zeros_like(batch.target[:, None])
    for step in range(steps):
        sigma = torch.full(clean.shape[:3], SCHEDULE.sigmas[step], device=clean.device)
        clean = _answer(flow, batch, history, clean, sigma, generator)
    return clean[:, 0]


@torch.no_grad()
def _redrawn(flow: Flow, batch: Batch, generator: torch.Generator, drawer: CausalWanModel) -> Batch:
    """With the history that the model draws: after a switch as the product does; in a first scene, which it would begin
    in its own way, in one step from noised truth, each block over the true ones."""
    prefix = batch.plan.prefix
    if prefix:
        past = batch.history[:, :prefix]
        drawn = draw_against(drawer, past, batch.embeds, batch.plan, batch.target, generator)
        return replace(batch, history=torch.cat((past, drawn.history), dim=1), answers=drawn.answers)
    target = batch.target[:, None]
    sigma = random_steps(target.shape[:3], generator, first=1).to(target.device)
    return replace(batch, history=_answer(flow, batch, batch.history, target, sigma, generator).flatten(1, 3))


def _answer(
    flow: Flow, batch: Batch, history: Tensor, clean: Tensor, sigma: Tensor, generator: torch.Generator
) -> Tensor:
    """What the model makes in one step of blocks [B, copies, K, n, C, h, w] that are noised to sigma."""
    noisy = add_noise(clean, noise_like(clean, generator), sigma)
    with fast_precision(clean.device):
        found = flow(history, noisy, 1000 * sigma, batch.embeds, batch.plan)
    return end_of(found, noisy, sigma)


def train_dit(folder: Path, recipe: DiTRecipe, until: int | None = None, start_from: Path | None = None) -> Flow:
    """Train, or go on training; returns the transformer with averaged weights.

    `start_from`: folder of a finished model whose transformer a new run begins with, at the recipe's `joined`, and
    whose text encoder and linear code it learns by.
    """
    _check(folder, recipe, until, start_from)
    if start_from is not None:
        adopt_linear_code(folder, start_from)
    fit_linear_code(folder)
    loaders = LOADERS if training_device().type == "cuda" else 0
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    given = (server.port, folder, recipe, until, start_from, loaders)
    # Daemons end when this process ends by itself, and it need not wait for them; but they may have no loaders.
    try:
        spawn(_worker, given, nprocs=PARTS, daemon=not loaders)  # type: ignore[no-untyped-call]
    except ProcessExitedException as error:
        if error.exit_code != TOLD:
            raise
        raise ToldElsewhere("a process of the training has said what is wrong") from error
    return cast(Flow, averaged(_stage(folder, recipe, until).path, Flow()))


def _check(folder: Path, recipe: DiTRecipe, until: int | None, start_from: Path | None) -> None:
    """Raises InputError if the run cannot begin, or cannot go on with what `folder` holds, before anything of a run
    that has begun is changed."""
    stage = _stage(folder, recipe, until)
    state = stage.stored()
    if start_from is not None:
        if state is None:
            finished_transformer(start_from, "--start-from")
            if stage.end <= (first := int(recipe.joined * recipe.steps)):
                raise InputError(f"--until: {until} is before step {first}, at which --start-from begins; give more")
        elif not state.get("began"):
            raise InputError(f"--start-from: {stage.path} was begun without it; leave it out, or give another --work")
        adopt_text_encoder(folder, start_from)
    text = fingerprint(trained_text_encoder(folder))
    if state is None:
        (folder / TEACHER).unlink(missing_ok=True)  # of a run whose state is gone
        return
    averaged(stage.path, Flow())
    check_text(state, stage.path, text)


def _stage(folder: Path, recipe: DiTRecipe, until: int | None) -> Stage:
    return Stage(folder, "dit", recipe.steps, until, sizes=sizes_of(recipe))


def _worker(
    rank: int, port: int, folder: Path, recipe: DiTRecipe, until: int | None, start_from: Path | None, loaders: int
) -> None:
    end_with_parent()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=TCPStore("127.0.0.1", port), rank=rank, world_size=PARTS)
    try:
        _Run(folder, recipe, until, start_from, rank, PARTS).train(loaders)
    except InputError as error:  # a disk that is full by now
        sys.stderr.write(f"error: {error}\n")
        command.end(TOLD)
    dist.destroy_process_group()
    command.end(0)


class _Run:
    """One process of `workers`. All hold the same weights and do the same updates; the first logs and saves."""

    def __init__(
        self,
        folder: Path,
        recipe: DiTRecipe,
        until: int | None = None,
        start_from: Path | None = None,
        rank: int = 0,
        workers: int = 1,
    ) -> None:
        torch.manual_seed(TRAIN_SEED)
        if rank == 0:
            log_to_stdout()
        self._recipe, self._rank, self._workers = recipe, rank, workers
        self._device = training_device()
        code, text = fit_linear_code(folder), trained_text_encoder(folder)
        self._text = fingerprint(text)
        self._batches = Batches(recipe, code, text, rank, workers)
        parts, given = range(rank, PARTS, workers), (recipe.batch, recipe.later_seeds)
        self._stories = {part: Stories(code, text, part, *given) for part in parts}
        self._stage = _stage(folder, recipe, until)
        self._flow = Flow(recipe.compile).to(self._device)
        self._named = dict(self._flow.named_parameters())
        matrices = {name: p for name, p in self._named.items() if _is_matrix(name, p)}
        rest = [p for name, p in self._named.items() if name not in matrices]
        self._optimizers = Optimizers(list(matrices.values()), rest, recipe.muon_lr, recipe.adam_lr)
        self._teacher: Flow | None = None
        self._began = self._start = 0
        self._average = Average(self._named, recipe.decay)
        self._drawer = self._average.shared_with(Flow().to(self._device)).model  # as the finished model will draw
        self._restore(start_from)

    def train(self, loaders: int = 0) -> None:
        """Every step that is left; `loaders` processes make its batches ahead of time."""
        steps = range(self._start, self._stage.end)
        loader = DataLoader(self._batches, batch_size=None, sampler=steps, num_workers=loaders)
        for step, parts in zip(steps, loader, strict=True):
            name = f"loss on {_kind(parts[0].plan)}" if parts else "loss on stories"
            if parts and parts[0].distilled:
                name = "distillation"
            stories = [] if parts else [one.next(self._drawer, step) for one in self._stories.values()]
            loss, due = self._step(step, [part.to(self._device) for part in parts or stories])
            row = {name: loss}
            gathered = self._gathered() if due else None
            if self._rank == 0:
                ages = [age for one in self._stories.values() for age in one.ages]
                row |= {"turns of a story": sum(ages) / len(ages)} if ages else {}
                self._stage.after(step, row, lambda stories=gathered: {**self._state(), "stories": stories}, due)
            for one in self._stories.values():
                one.ages.clear()

    def _step(self, step: int, parts: list[Batch]) -> tuple[float, bool]:
        """One update; returns the loss, and whether it is time to save, in which all processes agree."""
        if any(part.distilled for part in parts) and self._teacher is None:
            self._teacher = self._frozen_teacher()
        found = torch.zeros(2, device=self._device)  # the loss; whether the first process wants to save
        for part in parts:
            here = batch_loss(self._flow, self._teacher, part, self._drawer)
            torch.autograd.backward(here)
            found[0] += here.detach()
        found[1] = float(self._rank == 0 and self._stage.due(step))
        self._sum_over_workers([p.grad for p in self._named.values() if p.grad is not None], found)
        share = trapezoid(step, self._recipe.steps, cool_down=self._recipe.cool_down, began=self._began)
        self._optimizers.step(share)
        self._average.update(self._named, step)
        loss, due = found.tolist()
        return loss, due > 0

    def _sum_over_workers(self, grads: list[Tensor], found: Tensor) -> None:
        if self._workers == 1:
            return
        tensors = [*grads, found]
        together = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(together)
        for tensor, part in zip(tensors, torch.split(together, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def _frozen_teacher(self) -> Flow:
        """The averaged model as it was when distillation began; kept in a file for runs that are resumed."""
        path = self._stage.folder / TEACHER
        if not path.is_file() and self._rank == 0:
            save({"average": self._average.values}, path)
        if self._workers > 1:
            dist.barrier()
        teacher = averaged(path, Flow(self._recipe.compile)).to(self._device)
        return cast(Flow, teacher.requires_grad_(False))

    def _gathered(self) -> list[object] | None:
        """The stories of all parts, for the process that saves; all processes call this together."""
        own: list[object] = [one.state() for one in self._stories.values()]
        if self._workers == 1:
            return own
        found: list[object] = [None] * self._workers
        dist.gather_object(own, found if self._rank == 0 else None)
        return [state for states in found for state in cast("list[object]", states)] if self._rank == 0 else None

    def _state(self) -> dict[str, object]:
        states = {"flow": self._flow.state_dict(), "optimizers": self._optimizers.state_dict()}
        return {**states, "average": self._average.values, "began": self._began, "text": self._text}

    def _restore(self, start_from: Path | None) -> None:
        state = self._stage.resume()
        if state is None and start_from is not None:
            self._flow.model.load_state_dict(finished_transformer(start_from, "--start-from"))
            self._average.load({name: value.detach() for name, value in self._named.items()})
            self._began = self._start = int(self._recipe.joined * self._recipe.steps)
        if state is None:
            return
        self._flow.load_state_dict(cast("dict[str, Tensor]", state["flow"]))
        self._average.load(cast("dict[str, Tensor]", state["average"]))
        self._optimizers.load_state_dict(cast("list[dict[str, object]]", state["optimizers"]))
        for part, one in self._stories.items():
            one.restore(cast("list[list[dict[str, object]]]", state["stories"])[part])
        self._began, self._start = cast(int, state["began"]), cast(int, state["step"])


def _kind(plan: Plan) -> str:
    return f"{plan.blocks} blocks" + (" after a switch" if plan.prefix else "")


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """What Muon is for: the layers' matrices, not embeddings, heads, or tables."""
    inside = name.startswith("model.blocks")
    return inside and parameter.ndim == 2 and min(parameter.shape) > 8
