"""Merging a LoRA into a model's weights before the model is built.

Merged weights cost nothing at run time and need no adapter library. This file knows the arithmetic
W + (alpha / rank) · B·A (Hu et al., arXiv 2106.09685) and who says what alpha is; names are the business of
`wan.checkpoints.lora_names`. It does not know which layers a model has beyond the names in the state that it is given.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from utils.errors import InputError, shown
from wan.checkpoints.files import NAME_LIMIT, identify_hint, some_names
from wan.checkpoints.filling import require_finite
from wan.checkpoints.lora_names import LayerNames, Role, other_method
from wan.checkpoints.lora_settings import LoraSettings
from wan.checkpoints.quantisation import dequantised, scale_names
from wan.checkpoints.state import named, no_weight

logger = logging.getLogger(__name__)

# Where training code keeps a LoRA, the generator's own first.
CONTAINERS = ("generator_lora", "lora", "lora_state_dict", "generator", "model", "state_dict", "module")
LEAVE_OUT = "leave out adapter.rank and adapter.alpha (on the command line: adapter=null)"
LEFT_OVER = 8.0  # times the file's own strength: beyond, an alpha was meant for another file


@dataclass(frozen=True)
class LoraLayer:
    """What is added to one layer, each None where the file has none of it."""

    name: str
    a: Tensor | None = None  # [rank, in]; of a convolution, [rank, in, ...]
    b: Tensor | None = None  # [out, rank]; of a convolution, [out, rank, 1, ...]
    scale: float = 1.0  # of B·A, by what the file says
    diff: Tensor | None = None  # added to the weight as it is
    diff_b: Tensor | None = None  # added to the bias as it is

    @property
    def rank(self) -> int | None:
        return None if self.a is None else self.a.shape[0]


def merge_lora(
    state: dict[str, Tensor],
    lora_mapping: Mapping[str, object],
    rank: int | None,
    alpha: float | None,
    source: Path,
    strength: float = 1.0,
    warn: Callable[[str], None] = logger.warning,
) -> int:
    """Replace in `state` every weight that the LoRA touches by W + strength · (alpha / rank) · B·A, in float32.

    The tensors that were in `state` are not written to; they may be on the meta device. `rank` is checked against the
    file, and None takes the file's; `alpha` None takes the file's, of every layer, or the rank where the file says
    none. Everything is checked before anything is replaced. `warn` gets what may be a mistake. Returns the number of
    merged layers. Raises InputError: no layer touched, a name that is not known, a layer that `state` lacks, one factor
    without the other, shapes that do not fit, a rank other than the file's, or an alpha that must have been meant for
    another.
    """
    layers = read_lora(lora_mapping, state, source, warn)
    for layer in layers:
        _check_layer(layer, state, source)
    scales = _scales(layers, rank, alpha, source, warn)
    scale_of_weight = scale_names(state)
    for layer, scale in zip(layers, scales, strict=True):
        name = f"{layer.name}.weight"
        stored = scale_of_weight.get(name)
        weight = dequantised(state[name], None if stored is None else state[stored])
        state[name] = _merged(weight, layer, scale, strength)
        if stored is not None:
            del state[stored]
        if layer.diff_b is not None:
            bias = state[f"{layer.name}.bias"].float()
            state[f"{layer.name}.bias"] = bias + strength * layer.diff_b.to(bias)
    return len(layers)


def _merged(weight: Tensor, layer: LoraLayer, scale: float, strength: float) -> Tensor:
    if layer.diff is not None:
        weight = weight + strength * layer.diff.to(weight)
    if layer.a is None or layer.b is None:
        return weight
    a, b = layer.a.to(weight).flatten(1), layer.b.to(weight).flatten(1)
    return torch.addmm(weight.flatten(1), b, a, alpha=strength * scale).view_as(weight)


def read_lora(
    mapping: Mapping[str, object],
    state: Iterable[str],
    source: Path,
    warn: Callable[[str], None] = logger.warning,
) -> list[LoraLayer]:
    """The LoRA's layers under the names of the model whose tensors `state` names, with the file's own scales.

    Raises InputError: names that are not known, layers that the model lacks, one factor without the other, numbers that
    cannot be weights.
    """
    by_layer = _parts(_container(mapping, source), LayerNames.of(state), source)
    faulty = [name for name, parts in by_layer.items() if ("A" in parts) != ("B" in parts)]
    if faulty:
        have = "lora_A" if "A" in by_layer[faulty[0]] else "lora_B"
        raise InputError(
            f"{shown(source)}: {len(faulty)} layers have one LoRA factor without the other, for example "
            f"{_quoted(faulty[0])} has {have} alone. The file is incomplete."
        )
    by_layer = {name: parts for name, parts in by_layer.items() if set(parts) != {"alpha"}}
    if not by_layer:
        raise InputError(f"{shown(source)}: the LoRA touches no layer; it holds no lora_A and lora_B tensors.")
    _require_layers(by_layer, set(state), source)
    settings = LoraSettings.beside(source)
    ranks = {name: parts["A"].shape[0] for name, parts in by_layer.items() if "A" in parts and parts["A"].ndim}
    if settings is not None and not settings.fits(ranks):
        warn(
            f"{shown(source)}: the settings in {shown(settings.source)} are of another rank ({settings.rank}), so they "
            "are another file's, and ignored."
        )
        settings = None
    return [_layer(name, parts, settings) for name, parts in by_layer.items()]


def _layer(name: str, parts: Mapping[Role, Tensor], settings: LoraSettings | None) -> LoraLayer:
    a, alpha = parts.get("A"), parts.get("alpha")
    scale = 1.0
    if a is not None and a.ndim > 0 and a.shape[0] > 0:
        if alpha is not None:
            scale = float(alpha) / a.shape[0]
        elif settings is not None:
            scale = settings.scale(name, a.shape[0])
    return LoraLayer(name, a, parts.get("B"), scale, parts.get("diff"), parts.get("diff_b"))


def _container(mapping: Mapping[str, object], source: Path) -> Mapping[str, object]:
    while True:
        found = next((name for name in CONTAINERS if isinstance(mapping.get(name), Mapping)), None)
        if found is None:
            break
        mapping = named(mapping[found])
    if any(isinstance(value, Mapping) for value in mapping.values()):
        held = some_names(mapping)
        raise InputError(f"{shown(source)} has no {CONTAINERS[0]}; it holds {held}. {identify_hint(source)}")
    return mapping


def _parts(container: Mapping[str, object], names: LayerNames, source: Path) -> dict[str, dict[Role, Tensor]]:
    by_layer: dict[str, dict[Role, Tensor]] = {}
    unknown = []
    for name, value in container.items():
        part = names.part(name)
        if part is None:
            unknown.append(name)
            continue
        tensor = torch.tensor(value) if part.role == "alpha" and isinstance(value, (int, float)) else value
        fault = "is no tensor" if not isinstance(tensor, Tensor) else _fault(tensor, part.role)
        if fault is not None:
            raise InputError(f"{shown(source)}: {_quoted(name)} {fault}. {identify_hint(source)}")
        parts = by_layer.setdefault(part.layer, {})
        if part.role in parts:
            role = f"lora_{part.role}" if part.role in ("A", "B") else part.role
            raise InputError(f"{shown(source)}: the LoRA has {role} of {_quoted(part.layer)} twice.")
        parts[part.role] = cast("Tensor", tensor)
    if unknown:
        method = other_method(unknown)
        why = f"It is {method}, which is not read here" if method else "A LoRA has lora_A and lora_B, or down and up"
        raise InputError(
            f"{shown(source)}: {len(unknown)} of {len(container)} names are not known to be those of a LoRA: "
            f"{some_names(unknown)}. {why}. {identify_hint(source)}"
        )
    return by_layer


def _fault(tensor: Tensor, role: Role) -> str | None:
    if role != "alpha":
        return no_weight(tensor)
    if tensor.is_meta or tensor.numel() != 1 or tensor.is_complex() or not math.isfinite(float(tensor)):
        return "is the alpha of a layer, and no number"
    return None


def _require_layers(layers: Mapping[str, object], state: set[str], source: Path) -> None:
    unknown = [layer for layer in layers if f"{layer}.weight" not in state]
    if unknown:
        made_for = "an image-to-video model" if any("_img" in layer for layer in unknown) else "another model"
        raise InputError(
            f"{shown(source)}: the LoRA names {len(unknown)} of {len(layers)} layers that the model lacks: "
            f"{some_names(unknown)}. It was made for {made_for}. {identify_hint(source)}"
        )


def _check_layer(layer: LoraLayer, state: Mapping[str, Tensor], source: Path) -> None:
    weight, bias = state[f"{layer.name}.weight"], state.get(f"{layer.name}.bias")
    a, b = layer.a, layer.b
    if a is not None and b is not None:
        fits = a.ndim == b.ndim == weight.ndim >= 2 and a.shape[0] == b.flatten(1).shape[1] > 0
        if not fits or (b.shape[0], *a.shape[1:]) != tuple(weight.shape):
            raise InputError(
                f"{shown(source)}: the LoRA of {_quoted(layer.name)} does not fit: lora_A {list(a.shape)}, lora_B "
                f"{list(b.shape)}, weight {list(weight.shape)}; wanted are [rank, in], [out, rank] and [out, in]. It "
                f"was made for a model of another size. {identify_hint(source)}"
            )
    for kind, diff, tensor in (("diff", layer.diff, weight), ("diff_b", layer.diff_b, bias)):
        if diff is not None and (tensor is None or diff.shape != tensor.shape):
            found = "none" if tensor is None else list(tensor.shape)
            raise InputError(
                f"{shown(source)}: {kind} of {_quoted(layer.name)} does not fit: it has {list(diff.shape)}, the model "
                f"{found}. {identify_hint(source)}"
            )
    for added in (a, b, layer.diff, layer.diff_b):
        if added is not None and not weight.is_meta:
            require_finite(added.float(), f"LoRA of {layer.name}", source)


def _scales(
    layers: list[LoraLayer], rank: int | None, alpha: float | None, source: Path, warn: Callable[[str], None]
) -> list[float]:
    """By what B·A of every layer is multiplied. Raises InputError where `rank` or `alpha` are another file's."""
    own = [layer.scale for layer in layers]
    factored = [layer for layer in layers if layer.rank is not None]
    if not factored:
        return own
    first = factored[0]
    own_alpha, own_rank = first.scale * (first.rank or 1), first.rank
    ranks = sorted({layer.rank for layer in factored if layer.rank is not None})
    of_file = f"its own, rank {own_rank} and alpha {own_alpha:g}, give B·A times {first.scale:g}"
    if rank is not None and ranks != [rank]:
        raise InputError(
            f"adapter.rank is {rank}, but {shown(source)} has rank {', '.join(map(str, ranks[:NAME_LIMIT]))} (layer "
            f"{_quoted(first.name)}). The section `adapter` is another file's: {LEAVE_OUT}; {of_file}."
        )
    if alpha is None:
        return own
    given = [alpha / (layer.rank or 1) for layer in layers]
    ratio = max(scale / layer.scale if layer.scale else 1.0 for layer, scale in zip(layers, given, strict=True))
    said = f"adapter.alpha is {alpha:g}, which with rank {own_rank} of {shown(source)} gives B·A times"
    strength = f"{said} {alpha / (own_rank or 1):g}; {of_file}"
    if ratio > LEFT_OVER:
        raise InputError(f"{strength}. It was meant for another file: {LEAVE_OUT}, or set adapter.alpha={own_alpha:g}.")
    if any(not math.isclose(scale, stored, rel_tol=1e-6) for scale, stored in zip(given, own, strict=True)):
        warn(f"{strength}. To have the file's own, {LEAVE_OUT}.")
    return given


def _quoted(name: str) -> str:
    return f"'{shown(name, NAME_LIMIT)}'"
