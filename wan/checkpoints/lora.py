"""Merging a LoRA into a model's weights before the model is built.

Merged weights cost nothing at run time and need no adapter library. This file knows peft's names for the two factors
of a layer and the arithmetic W + (alpha / rank) · B·A (Hu et al., arXiv 2106.09685); it does not know which layers a
model has beyond the names in the state that it is given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from utils.errors import InputError
from wan.checkpoints.files import some_names, strip_wrappers

CONTAINER = "generator_lora"
PEFT_PREFIX = "base_model.model."
# `.lora_A.weight`, or with the adapter's name between: `.lora_A.default.weight`.
FACTOR = re.compile(r"(?P<layer>.+)\.lora_(?P<factor>[AB])(?:\.[^.]+)?\.weight")


@dataclass(frozen=True)
class Factors:
    """The two matrices of one layer: a [rank, in], b [out, rank]."""

    a: Tensor
    b: Tensor


def merge_lora(
    state: dict[str, Tensor],
    lora_mapping: Mapping[str, object],
    rank: int | None,
    alpha: float | None,
    source: Path,
) -> int:
    """Replace in `state` every weight that the LoRA touches by W + (alpha / rank) · B·A, in float32.

    The tensors that were in `state` are not written to. `rank` is checked against the file (None: taken from it);
    `alpha` defaults to the rank. Everything is checked before anything is replaced. Returns the number of merged
    layers. Raises InputError: no layer touched, a layer that `state` lacks, one factor without the other, shapes that
    do not fit, a rank other than the file's.
    """
    layers = _factors(_container(lora_mapping, source), source)
    unknown = [layer for layer in layers if f"{layer}.weight" not in state]
    if unknown:
        raise InputError(
            f"{source}: the LoRA names {len(unknown)} of {len(layers)} layers that the model lacks: "
            f"{some_names(unknown)}. It was made for another model."
        )
    for layer, factors in layers.items():
        _check_layer(layer, factors, state[f"{layer}.weight"], rank, source)
    for layer, factors in layers.items():
        state[f"{layer}.weight"] = _merged(state[f"{layer}.weight"], factors, alpha)
    return len(layers)


def _merged(weight: Tensor, factors: Factors, alpha: float | None) -> Tensor:
    rank = factors.a.shape[0]
    scale = 1.0 if alpha is None else alpha / rank
    return torch.addmm(weight.float(), factors.b.float(), factors.a.float(), alpha=scale)


def _container(mapping: Mapping[str, object], source: Path) -> Mapping[str, object]:
    if isinstance(mapping.get(CONTAINER), Mapping):
        return cast("Mapping[str, object]", mapping[CONTAINER])
    if any(isinstance(value, Mapping) for value in mapping.values()):
        raise InputError(f"{source} has no {CONTAINER}; it holds {some_names(mapping)}.")
    return mapping


def _factors(container: Mapping[str, object], source: Path) -> dict[str, Factors]:
    halves: dict[str, dict[str, Tensor]] = {}
    for name, value in container.items():
        match = FACTOR.fullmatch(name)
        if match is None or not isinstance(value, Tensor):
            raise InputError(
                f"{source}: {name!r} is not a LoRA factor; wanted are tensors called "
                f"{PEFT_PREFIX}<layer>.lora_A.weight and .lora_B.weight, as peft saves them."
            )
        pair = halves.setdefault(_bare(match["layer"]), {})
        if match["factor"] in pair:
            raise InputError(f"{source}: the LoRA has lora_{match['factor']} of {_bare(match['layer'])!r} twice.")
        pair[match["factor"]] = value
    if not halves:
        raise InputError(f"{source}: the LoRA touches no layer; it holds no lora_A and lora_B tensors.")
    lone = [layer for layer, pair in halves.items() if len(pair) == 1]
    if lone:
        have = next(iter(halves[lone[0]]))
        raise InputError(
            f"{source}: {len(lone)} layers have one LoRA factor without the other, for example {lone[0]!r} has "
            f"lora_{have} alone. The file is incomplete."
        )
    return {layer: Factors(pair["A"], pair["B"]) for layer, pair in halves.items()}


def _bare(layer: str) -> str:
    """A layer's name without peft's prefix and the wrappers around and inside it."""
    stripped = strip_wrappers(layer).removeprefix(PEFT_PREFIX)
    return stripped if stripped == layer else _bare(stripped)


def _check_layer(layer: str, factors: Factors, weight: Tensor, rank: int | None, source: Path) -> None:
    a, b = factors.a, factors.b
    fits = a.ndim == b.ndim == weight.ndim == 2 and a.shape[0] == b.shape[1]
    if not fits or (b.shape[0], a.shape[1]) != tuple(weight.shape):
        raise InputError(
            f"{source}: the LoRA of {layer!r} does not fit: lora_A {list(a.shape)}, lora_B {list(b.shape)}, "
            f"weight {list(weight.shape)}; wanted are [rank, in], [out, rank] and [out, in]."
        )
    if rank is not None and a.shape[0] != rank:
        raise InputError(
            f"adapter.rank is {rank}, but {source} has rank {a.shape[0]} (layer {layer!r}). "
            f"Set adapter.rank to {a.shape[0]}, or leave it out."
        )
