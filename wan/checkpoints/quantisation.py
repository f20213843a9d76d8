"""Quantised checkpoints: FP8 weights with their scales, and the names of the other kinds, which are refused.

A weight of FP8 is stored as numbers of eight bits and a scale beside them; the weight is their product. ComfyUI calls
the scale `scale_weight` or `weight_scale`, others `weight_scale_inv`; it is one number, one a row, or one a block. This
file knows names, types and shapes; it opens no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")  # beside `weight`; all of them are multiplied by
# What says nothing about a weight: scales of activations, markers, and the tokenizer in ComfyUI's text encoders.
NO_WEIGHTS = ("scale_input", "input_scale", "output_scale", "comfy_quant", "scaled_fp8", "spiece_model")
FP8_DTYPES = frozenset(
    {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz},
)
WEIGHT_DTYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16}) | FP8_DTYPES
# Endings of names and what they say, the most telling first.
_MARKS = (
    ((".quant_state.bitsandbytes__nf4",), "NF4 of bitsandbytes"),
    ((".quant_state.bitsandbytes__fp4",), "FP4 of bitsandbytes"),
    ((".absmax", ".quant_map"), "4 bits of bitsandbytes"),
    ((".SCB", ".weight_format"), "INT8 of bitsandbytes"),
    ((".wscales", ".smooth_factor"), "SVDQuant (Nunchaku)"),
    ((".qzeros", ".g_idx"), "GPTQ or AWQ"),
    ((".qweight",), "packed integers"),
    ((".weight._data", ".weight._scale"), "optimum-quanto"),
    ((".weight_scale_2",), "NVFP4"),
)


def is_no_weight(name: str) -> bool:
    """Whether a tensor of this name is neither a weight nor the scale of one."""
    return name.rpartition(".")[2] in NO_WEIGHTS


def type_name(dtype: torch.dtype) -> str:
    """`float32` and the like."""
    return str(dtype).removeprefix("torch.")


def scale_names(state: Mapping[str, object]) -> dict[str, str]:
    """Names of weights to names of their scales, for the weights that have one."""
    found = {}
    for name in state:
        stem, _, leaf = name.rpartition(".")
        if leaf in SCALES and f"{stem}.weight" in state:
            found[f"{stem}.weight"] = name
    return found


def dequantised(weight: Tensor, scale: Tensor | None) -> Tensor:
    """The weight in float32, multiplied by its scale if it has one, whose shape must fit (see `expanded`)."""
    if scale is None:
        return weight.float()
    factor = expanded(scale.float(), weight.shape)
    assert factor is not None, "scales are checked before weights are converted"
    return weight.float() * factor.to(weight.device)


def expanded(scale: Tensor, shape: Sequence[int]) -> Tensor | None:
    """A scale so that it multiplies a weight of this shape, or None if it cannot.

    Read are one number; one a row, [N] or [N, 1]; one a block of equal size, [N / n, K / k]; and [N, K / k, 1].
    """
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.ndim == 1 and len(shape) > 0 and scale.shape[0] == shape[0]:
        return scale.reshape(-1, *(1 for _ in shape[1:]))
    if scale.ndim == len(shape) + 1 and scale.shape[-1] == 1:
        scale = scale[..., 0]
    if scale.ndim != len(shape) or not all(map(_divides, scale.shape, shape)):
        return None
    for axis, (size, count) in enumerate(zip(shape, scale.shape, strict=True)):
        if count not in (1, size):
            scale = scale.repeat_interleave(size // count, dim=axis)
    return scale


def _divides(count: int, size: int) -> bool:
    return count > 0 and size % count == 0


def quantisation_of(types: Mapping[str, str]) -> str | None:
    """What kind of quantisation names and types of numbers (as `type_name` gives them) show; None for none."""
    for endings, kind in _MARKS:
        if any(name.endswith(endings) for name in types):
            return kind
    scaled = any(name.rpartition(".")[2] in SCALES for name in types)
    beside = "with scales" if scaled else "without scales"
    weights = {kind for name, kind in types.items() if name.rpartition(".")[2] not in (*SCALES, *NO_WEIGHTS)}
    if any(kind in ("uint8", "float8_e8m0fnu") for name, kind in types.items() if name.rpartition(".")[2] in SCALES):
        return "MXFP8 or MXFP4 (scales of eight bits)"
    for kind in sorted(weights):
        if kind.startswith("float8"):
            return f"FP8 ({kind.removeprefix('float8_')}) {beside}"
        if kind.startswith(("float4", "float6")):
            return f"{kind} {beside}"
    whole = sorted(kind for kind in weights if kind.startswith(("int", "uint", "qint", "quint")))
    return f"{whole[0]} {beside}" if whole and scaled else None
