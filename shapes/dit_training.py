"""Training of the causal transformer on latents of the linear code and on what the frozen text encoder makes of
captions.

Flow matching with block-causal teacher forcing (`shapes.forward`). Half of the noise levels are exactly those of the
four sampling steps. The history is what the product will have: a little noisy, and for a share of the steps drawn by
the model itself, in one step from noised truth, so that its own blur does no harm. Some batches are storyboards. Near
the end the blocks of short clips are distilled (`shapes.distill`).

Without a GPU two processes share a step, each on one core: two threads in every operation would wait for each other
all the time. A batch is always cut into the same two parts, whoever computes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import spawn
from torch.utils.data import DataLoader

from shapes.batches import PARTS, TRAIN_SEED, Batch, Batches, DiTRecipe
from shapes.distill import distillation_loss
from shapes.dit import Flow
from shapes.optim import Average, Optimizers, trapezoid
from shapes.reading import trained_text_encoder
from shapes.runs import Stage, averaged, log_to_stdout, save, training_device
from shapes.schedule import a_little_noisy, add_noise, noise_like, random_sigmas, random_steps
from shapes.vae import fit_linear_code

LOADERS = 8  # processes that make clips for a GPU, which is faster than they are


def batch_loss(flow: Flow, teacher: Flow | None, batch: Batch) -> Tensor:
    """The mean square error of the flow over all noisy blocks, times the batch's share of the step."""
    generator = torch.Generator().manual_seed(batch.seed)
    if not batch.distilled:
        return batch.share * teacher_forcing_loss(flow, batch, generator)
    assert teacher is not None
    copies = 2 * (batch.copies // 2)
    return batch.share * distillation_loss(flow, teacher, batch.latents, copies, batch.embeds, generator)


def teacher_forcing_loss(flow: Flow, batch: Batch, generator: torch.Generator) -> Tensor:
    x0, switch = batch.latents, batch.switch
    history = _redrawn(flow, batch, generator) if batch.own_history else x0
    target = x0[:, None, switch:].expand(-1, batch.copies, -1, -1, -1, -1, -1)
    noise = noise_like(target, generator)
    sigma = random_sigmas(target.shape[:3], generator).to(x0.device)
    with torch.autocast(x0.device.type, torch.bfloat16):
        noisy = add_noise(target, noise, sigma)
        found = flow(a_little_noisy(history, generator), noisy, 1000 * sigma, batch.embeds, switch)
    first = 0 if batch.first_block else 1
    return torch.nn.functional.mse_loss(found[:, :, first:], (noise - target)[:, :, first:])


@torch.no_grad()
def _redrawn(flow: Flow, batch: Batch, generator: torch.Generator) -> Tensor:
    """The batch's latents as the model draws them in one step from noised truth, each block over the true ones."""
    x0, switch = batch.latents, batch.switch
    later = x0[:, None, switch:]
    sigma = random_steps(later.shape[:3], generator, first=1).to(x0.device)
    noisy = add_noise(later, noise_like(later, generator), sigma)
    with torch.autocast(x0.device.type, torch.bfloat16):
        found = flow(x0, noisy, 1000 * sigma, batch.embeds, switch)
    drawn = (noisy - sigma[..., None, None, None, None] * found)[:, 0]
    return torch.cat((x0[:, :switch], drawn), dim=1)


def train_dit(folder: Path, recipe: DiTRecipe, until: int | None = None) -> Flow:
    """Train, or go on training; returns the transformer with averaged weights."""
    trained_text_encoder(folder)
    fit_linear_code(folder)
    if training_device().type == "cuda":
        _Run(folder, recipe, until).train(LOADERS)
    else:
        server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        spawn(_worker, (server.port, folder, recipe, until), nprocs=PARTS)  # type: ignore[no-untyped-call]
    return cast(Flow, averaged(Stage(folder, "dit", recipe.steps).path, Flow()))


def _worker(rank: int, port: int, folder: Path, recipe: DiTRecipe, until: int | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=TCPStore("127.0.0.1", port), rank=rank, world_size=PARTS)
    _Run(folder, recipe, until, rank, PARTS).train()
    dist.destroy_process_group()


class _Run:
    """One process of `workers`. All hold the same weights and do the same updates; the first logs and saves."""

    def __init__(
        self, folder: Path, recipe: DiTRecipe, until: int | None = None, rank: int = 0, workers: int = 1
    ) -> None:
        torch.manual_seed(TRAIN_SEED)
        if rank == 0:
            log_to_stdout()
        self._recipe, self._rank, self._workers = recipe, rank, workers
        self._device = training_device()
        self._batches = Batches(recipe, fit_linear_code(folder), trained_text_encoder(folder), rank, workers)
        self._stage = Stage(folder, "dit", recipe.steps, until)
        self._flow = Flow(recipe.compile).to(self._device)
        self._named = dict(self._flow.named_parameters())
        matrices = {name: p for name, p in self._named.items() if _is_matrix(name, p)}
        rest = [p for name, p in self._named.items() if name not in matrices]
        self._optimizers = Optimizers(list(matrices.values()), rest, recipe.muon_lr, recipe.adam_lr)
        self._average = Average(self._named, recipe.decay)
        self._teacher: Flow | None = None
        self._start = self._restore()

    def train(self, loaders: int = 0) -> None:
        """Every step that is left; `loaders` processes make its batches ahead of time."""
        steps = range(self._start, self._stage.end)
        loader = DataLoader(self._batches, batch_size=None, sampler=steps, num_workers=loaders)
        for step, parts in zip(steps, loader, strict=True):
            loss = self._step(step, [part.to(self._device) for part in parts])
            if self._rank == 0:
                blocks = parts[0].latents.shape[1]
                name = "distillation" if parts[0].distilled else f"loss on {blocks} blocks"
                self._stage.after(step, {name: loss}, self._state)

    def _step(self, step: int, parts: list[Batch]) -> float:
        """One update; returns the loss."""
        if any(part.distilled for part in parts) and self._teacher is None:
            self._teacher = self._frozen_teacher()
        loss = torch.zeros((), device=self._device)
        for part in parts:
            here = batch_loss(self._flow, self._teacher, part)
            torch.autograd.backward(here)
            loss += here.detach()
        self._sum_over_workers([p.grad for p in self._named.values() if p.grad is not None], loss)
        self._optimizers.step(trapezoid(step, self._recipe.steps, cool_down=self._recipe.cool_down))
        self._average.update(self._named, step)
        return loss.item()

    def _sum_over_workers(self, grads: list[Tensor], loss: Tensor) -> None:
        if self._workers == 1:
            return
        tensors = [*grads, loss]
        together = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(together)
        for tensor, part in zip(tensors, torch.split(together, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def _frozen_teacher(self) -> Flow:
        """The averaged model as it was when distillation began; kept in a file for runs that are resumed."""
        path = self._stage.folder / "teacher.pt"
        if not path.is_file() and self._rank == 0:
            save({"average": self._average.values}, path)
        if self._workers > 1:
            dist.barrier()
        teacher = averaged(path, Flow(self._recipe.compile)).to(self._device)
        return cast(Flow, teacher.requires_grad_(False))

    def _state(self) -> dict[str, object]:
        states = {"flow": self._flow.state_dict(), "optimizers": self._optimizers.state_dict()}
        return {**states, "average": self._average.values}

    def _restore(self) -> int:
        state = self._stage.resume()
        if state is None:
            return 0
        self._flow.load_state_dict(cast("dict[str, Tensor]", state["flow"]))
        self._average.load(cast("dict[str, Tensor]", state["average"]))
        self._optimizers.load_state_dict(cast("list[dict[str, object]]", state["optimizers"]))
        return cast(int, state["step"])


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """What Muon is for: the layers' matrices, not embeddings, heads, or tables."""
    inside = name.startswith("model.blocks")
    return inside and parameter.ndim == 2 and min(parameter.shape) > 8
