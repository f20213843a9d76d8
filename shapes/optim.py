"""Muon for matrices and kernels, Adam for everything else, and averaged weights.

Muon (Keller Jordan, 2024): momentum whose update is made orthogonal by a few Newton-Schulz steps, so that all its
directions weigh alike. Learning rates are set by the caller for every step. torch.optim.Muon takes matrices alone; half
of what is trained here are kernels of convolutions, whose dimensions but the first are taken together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the quintic's coefficients; five steps bring singular values near 1
MOMENTUM = 0.95
M = TypeVar("M", bound=nn.Module)


def orthogonalize(update: Tensor, steps: int = 5) -> Tensor:
    """A matrix with the same singular vectors and singular values of about 1."""
    a, b, c = _NEWTON_SCHULZ
    x = update / (update.norm() + 1e-7)
    if x.is_cuda:
        x = x.bfloat16()  # the steps correct their own rounding
    wide = x if x.shape[0] <= x.shape[1] else x.T
    for _ in range(steps):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    result: Tensor = wide if x.shape[0] <= x.shape[1] else wide.T
    return result.type_as(update)


class Muon(torch.optim.Optimizer):
    """For parameters with two or more dimensions; the first is the output's, the others are taken together."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - MOMENTUM)
                update = parameter.grad.lerp(momentum, MOMENTUM).flatten(1)
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(orthogonalize(update).reshape_as(parameter), alpha=-group["lr"] * scale)


class Optimizers:
    """Muon and Adam side by side; `step(share)` scales both learning rates by `share`."""

    def __init__(self, matrices: list[nn.Parameter], rest: list[nn.Parameter], muon_lr: float, adam_lr: float) -> None:
        self._rates = (muon_lr, adam_lr)
        self._parts = (Muon(matrices, muon_lr, weight_decay=0.01), torch.optim.Adam(rest, adam_lr, betas=(0.9, 0.99)))

    def step(self, share: float) -> None:
        for part, rate in zip(self._parts, self._rates, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * share
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, object]]:
        return [part.state_dict() for part in self._parts]

    def load_state_dict(self, states: list[dict[str, object]]) -> None:
        for part, state in zip(self._parts, states, strict=True):
            part.load_state_dict(state)


class Average:
    """Exponentially averaged copies of tensors."""

    def __init__(self, tensors: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.values = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        for name, value in self.values.items():
            value.copy_(values[name])

    @torch.no_grad()
    def update(self, tensors: Mapping[str, Tensor], step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))  # early weights should be forgotten soon
        for name, value in self.values.items():
            value.lerp_(tensors[name].detach(), 1 - decay)

    @torch.no_grad()
    def shared_with(self, module: M) -> M:
        """The module, whose parameters of these names are the averages themselves from now on. It keeps its tensors,
        since some are views of others: a layer's q, k and v are parts of one product."""
        named = dict(module.named_parameters())
        for name, value in self.values.items():
            self.values[name] = named[name].data.copy_(value)
        return module


def trapezoid(step: int, steps: int, warm_up: int = 50, cool_down: float = 0.3, began: int = 0) -> float:
    """The learning rate's share: a short rise from step `began` on, a plateau, and a straight fall to 0 over the last
    `cool_down`."""
    return min(1.0, (step - began + 1) / warm_up, max(0.0, (steps - step) / (cool_down * steps)))
