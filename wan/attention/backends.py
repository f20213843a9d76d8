"""One attention for every place that needs one: self- and cross-attention, any head count, on any device.

The backend is chosen once, from what the device can do (its compute capability, never its name) and what is installed.
There are no masks: what a head may see is what it is given.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import cache
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from utils.errors import InputError

logger = logging.getLogger(__name__)

AttentionName = Literal["auto", "sdpa", "cudnn", "fa2", "fa3", "varlen"]
"""varlen: self-attention as in wan.attention.varlen, the rest as auto."""

AttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q [B, L, H, D], k [B, S, H, D], v [B, S, H, D]) -> [B, L, H, D]; softmax(q k^T / sqrt(D)) v."""

HOPPER = (9, 0)
AMPERE = (8, 0)
FlashName = Literal["fa2", "fa3"]
FLASH_MODULES: dict[FlashName, str] = {"fa2": "flash_attn", "fa3": "flash_attn_interface"}


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's scaled_dot_product_attention; works everywhere and is what the other backends are compared with."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA with cuDNN's kernel first; PyTorch's own order has it behind FlashAttention 2, which is slower on Hopper."""
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        return sdpa(q, k, v)


@cache
def flash_function(name: FlashName, function: str = "flash_attn_func") -> Callable[..., object] | str:
    """The function of the package of "fa2" or "fa3", or why there is none. A package that is there need not load: its
    binary may be made for another PyTorch, CUDA or C library."""
    module = FLASH_MODULES[name]
    try:
        found: Callable[..., object] = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        return "which is not installed" if error.name == module else f"which does not load ({error})"
    except Exception as error:  # of loading a binary: ImportError, OSError, RuntimeError and what else it may run into
        reason = (str(error).splitlines() or [""])[0].strip() or type(error).__name__
        return f"which does not load ({reason})"
    return found


@cache
def usable(name: FlashName) -> bool:
    """Whether the package of "fa2" or "fa3" is there and loads; one that does not load is passed over aloud."""
    found = flash_function(name)
    if isinstance(found, str) and "not installed" not in found:
        logger.warning("attention: %s is passed over: it needs %s, %s", name, FLASH_MODULES[name], found)
    return not isinstance(found, str)


def _flash(name: FlashName) -> AttentionFn:
    """Raises InputError if its package is missing or does not load."""
    function = flash_function(name)
    if isinstance(function, str):
        raise InputError(f"attention: {name!r} needs the package {FLASH_MODULES[name]}, {function}; use 'auto'")

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q, k, v)
        return cast(Tensor, out[0] if isinstance(out, tuple) else out)  # some FA3 releases return (out, lse)

    return flash


def choose_backend(device: torch.device, dtype: torch.dtype) -> AttentionName:
    """The fastest backend that this device, this dtype and this installation have, once its package is loaded."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "sdpa"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] == HOPPER[0] and usable("fa3"):
        return "fa3"
    if capability >= HOPPER and torch.version.hip is None:
        return "cudnn"
    if capability >= AMPERE and usable("fa2"):
        return "fa2"
    return "sdpa"


def attention_backend(name: AttentionName, device: torch.device, dtype: torch.dtype) -> AttentionFn:
    """The attention function called `name` ("auto" chooses; for "varlen" what is used beside it).

    Raises InputError if it was asked for by name and cannot run here.
    """
    chosen = choose_backend(device, dtype) if name in ("auto", "varlen") else name
    if chosen == "sdpa":
        return sdpa
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        raise InputError(
            f"attention: {chosen!r} needs an NVIDIA GPU and bf16, not {device.type} and {dtype}; use 'auto'"
        )
    if chosen == "cudnn":
        return cudnn
    if chosen == "fa3" and torch.cuda.get_device_capability(device)[0] != HOPPER[0]:
        raise InputError(f"attention: 'fa3' runs on compute capability 9.x only, this is {device}; use 'auto'")
    return _flash(cast(FlashName, chosen))
