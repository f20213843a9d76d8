"""Names of the VAE's parameters: those of Wan2.1_VAE.pth as those of Diffusers' AutoencoderKLWan, which are ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from re import Match
from typing import TypeVar

T = TypeVar("T")

RESIDUAL = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}
UP_LAYERS = 4  # of each level of the decoder: three residual blocks, then the enlargement


def _middle(match: Match[str]) -> str:
    number = int(match[1])
    return "mid_block.attentions.0." if number == 1 else f"mid_block.resnets.{number // 2}."


def _upsample(match: Match[str]) -> str:
    block, layer = divmod(int(match[1]), UP_LAYERS)
    return f"up_blocks.{block}." + ("upsamplers.0." if layer == UP_LAYERS - 1 else f"resnets.{layer}.")


_RULES: tuple[tuple[str, str | Callable[[Match[str]], str]], ...] = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"(?<=coder\.)conv1\.", "conv_in."),
    (r"(?<=coder\.)head\.0\.", "norm_out."),
    (r"(?<=coder\.)head\.2\.", "conv_out."),
    (r"middle\.(\d)\.", _middle),
    (r"downsamples\.", "down_blocks."),
    (r"upsamples\.(\d+)\.", _upsample),
    (r"residual\.\d", lambda match: RESIDUAL[match[0]]),
    (r"\.shortcut\.", ".conv_shortcut."),
)


def diffusers_name(name: str) -> str:
    """The name that Diffusers has for a parameter of Wan2.1_VAE.pth."""
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name


def to_diffusers(state: Mapping[str, T]) -> dict[str, T]:
    """The tensors under Diffusers' names; those that have them already stay."""
    if "decoder.conv1.weight" not in state:
        return dict(state)
    return {diffusers_name(name): tensor for name, tensor in state.items()}
