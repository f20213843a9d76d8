"""From what a checkpoint holds to the tensors of one model under bare names.

Knows the containers in which training code keeps a generator, the prefixes of wrappers, files that hold several models,
and which tensors can be weights at all. It does not know layouts of names (`wan.checkpoints.diffusers_layout` and its
neighbours).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from utils.errors import InputError, shown
from wan.checkpoints.files import NAME_LIMIT, identify_hint, some_names
from wan.checkpoints.quantisation import WEIGHT_DTYPES, is_no_weight, quantisation_of, type_name

logger = logging.getLogger(__name__)

EMA_CONTAINERS = ("generator_ema", "ema", "ema_model", "model_ema", "ema_state_dict")
CONTAINERS = ("generator_ema", "generator", "model", "state_dict", "model_state_dict", "module", *EMA_CONTAINERS[1:])
FLAT_CONTAINERS = ("generator_ema", "generator")  # as prefixes of names, beside those of a critic
LEADING_WRAPPERS = frozenset({"model", "diffusion_model", "_forward_module", "generator", "transformer", "dit"})
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# Where a file holds all models of a pipeline (ComfyUI's checkpoints), the prefixes of each.
GENERATOR_PREFIXES = ("model.diffusion_model.",)
VAE_PREFIXES = ("vae.", "first_stage_model.")
TEXT_ENCODER_PREFIXES = ("text_encoders.umt5xxl.transformer.", "text_encoders.umt5xxl.", "text_encoder.")


def strip_wrappers(name: str) -> str:
    """A parameter's name without the prefixes of DDP, FSDP, torch.compile, checkpointing and training wrappers."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    first = next((i for i, part in enumerate(parts[:-1]) if part not in LEADING_WRAPPERS), len(parts) - 1)
    return ".".join(parts[first:]) if parts else name


def generator_state(mapping: Mapping[str, object], use_ema: bool, source: Path) -> dict[str, Tensor]:
    """The generator's tensors in a checkpoint's mapping, under bare names.

    Taken is `generator_ema` when `use_ema`, else `generator`, if the file has it; otherwise the first there is of
    CONTAINERS; otherwise the mapping itself; and so on within it. Raises InputError when that holds something other
    than tensors, or two names that are one without their wrappers.
    """
    found, mapping = opened(mapping, use_ema)
    if not found and not any(isinstance(value, Tensor) for value in mapping.values()) and mapping:
        raise InputError(
            f"{shown(source)} holds no generator: none of {', '.join(CONTAINERS)}, nor tensors alone. "
            f"Its top level is {some_names(mapping)}. {identify_hint(source)}"
        )
    wanted = "generator_ema" if use_ema else "generator"
    if found and found[0] != wanted:
        logger.info("%s has no %s; taking %s.", shown(source), wanted, " / ".join(found))
    return stripped_tensors(mapping, source, GENERATOR_PREFIXES)


def opened(mapping: Mapping[str, object], use_ema: bool = False) -> tuple[list[str], Mapping[str, object]]:
    """What the containers in a checkpoint's mapping lead to, and their names from the outside in."""
    chain: list[str] = []
    while (found := _container_in(mapping, use_ema)) is not None:
        chain.append(found[0])
        mapping = found[1]
    return chain, mapping


def _container_in(mapping: Mapping[str, object], use_ema: bool) -> tuple[str, Mapping[str, object]] | None:
    wanted = EMA_CONTAINERS if use_ema else ("generator",)
    name = next((name for name in (*wanted, *CONTAINERS) if isinstance(mapping.get(name), Mapping)), None)
    if name is not None:
        return name, named(mapping[name])
    flat = FLAT_CONTAINERS if use_ema else FLAT_CONTAINERS[::-1]
    for prefix in (f"{name}." for name in flat):
        inside = {key[len(prefix) :]: value for key, value in mapping.items() if key.startswith(prefix)}
        if inside:
            return prefix[:-1], inside
    return None


def named(container: object) -> dict[str, object]:
    """A container with texts for names, which in a pickle may be anything."""
    return {str(name): value for name, value in cast("Mapping[object, object]", container).items()}


def stripped_tensors(container: Mapping[str, object], source: Path, prefixes: Sequence[str] = ()) -> dict[str, Tensor]:
    """The tensors of one model under bare names; what quantised files say beside weights and scales is left out.

    Where names begin with one of `prefixes`, the file holds several models, and the others are left out. Raises
    InputError on what is no tensor or cannot be a weight, and on duplicates.
    """
    prefix = next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in container)), "")
    state: dict[str, Tensor] = {}
    for name, value in container.items():
        if not name.startswith(prefix) or is_no_weight(name):
            continue
        bare = strip_wrappers(name[len(prefix) :])
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise InputError(f"{shown(source)}: {_quoted(name)} is a {kind}; a tensor is wanted.")
        if bare in state:
            raise InputError(
                f"{shown(source)}: two tensors are called {_quoted(bare)} without their wrapper prefixes "
                f"({_quoted(name)})."
            )
        state[bare] = value
    if not state:
        raise InputError(f"{shown(source)} holds no tensors. {identify_hint(source)}")
    for name, tensor in state.items():
        fault = no_weight(tensor)
        if fault is not None:
            quantisation = quantisation_of({key: type_name(value.dtype) for key, value in state.items()})
            why = f"The file is quantised: {quantisation}, which is not read here. " if quantisation else ""
            raise InputError(
                f"{shown(source)}: tensor {_quoted(name)} {fault}. {why}Take a file in bf16, fp16, fp32 or FP8. "
                f"{identify_hint(source)}"
            )
    return state


def no_weight(tensor: Tensor) -> str | None:
    """Why the tensor cannot be a weight, as the end of a sentence, or None if it can; no number in it is read."""
    if tensor.is_meta:
        return "has no numbers (it was saved from the meta device)"
    if tensor.is_nested or tensor.layout != torch.strided:
        return f"is {'nested' if tensor.is_nested else str(tensor.layout).removeprefix('torch.')}, not dense"
    if tensor.is_quantized or tensor.dtype not in WEIGHT_DTYPES:
        return f"holds {type_name(tensor.dtype)} numbers, which cannot be weights"
    return None


def _quoted(name: str) -> str:
    return f"'{shown(name, NAME_LIMIT)}'"
