"""The small text encoder and the small VAE as Wan 2.1's published files have them.

Wan2.1_VAE.pth has no statistics of its latents; whoever loads it takes Wan 2.1's. So that latents of the linear code
have unit scale under those, z = latents · std + mean is folded into the encoder's last layer, and its inverse into the
decoder's first.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from wan.checkpoints.text_names import WAN_IN_BLOCK, WAN_TOP_LEVEL
from wan.checkpoints.vae_names import diffusers_name

LOG_VARIANCE = -6.0  # what the encoder says of its certainty; nobody reads it


@torch.no_grad()
def native_vae(vae: nn.Module) -> dict[str, Tensor]:
    """AutoencoderKLWan's tensors under the names of Wan2.1_VAE.pth, the normalisation folded in."""
    state = {name: value.detach().clone() for name, value in vae.state_dict().items()}
    settings = cast("Mapping[str, object]", vae.config)
    mean, std = (torch.tensor(cast("list[float]", settings[name])) for name in ("latents_mean", "latents_std"))
    channels = len(mean)
    last, first = state["quant_conv.weight"], state["post_quant_conv.weight"]
    last[:channels] *= std.view(-1, 1, 1, 1, 1)
    state["quant_conv.bias"][:channels] *= std
    state["quant_conv.bias"][:channels] += mean
    last[channels:] = 0.0
    state["quant_conv.bias"][channels:] = LOG_VARIANCE
    first /= std.view(1, -1, 1, 1, 1)
    state["post_quant_conv.bias"] -= first.flatten(1) @ mean
    names = native_names(state)
    return {native: state[name] for native, name in names.items()}


def native_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Wan's name of every tensor of AutoencoderKLWan -> Diffusers' name, found among all that Wan's file could have."""
    names = {diffusers_name(candidate): candidate for candidate in _candidates()}
    missing = state.keys() - names.keys()
    assert not missing, f"no native name for {sorted(missing)[:3]}"
    return {names[name]: name for name in state}


def _candidates() -> list[str]:
    leaves = ("weight", "bias", "gamma")
    inner = [f"residual.{i}.{leaf}" for i, leaf in itertools.product((0, 2, 3, 6), leaves)]
    inner += [f"{part}.{leaf}" for part, leaf in itertools.product(("shortcut", "resample.1", "time_conv"), leaves)]
    inner += [f"{part}.{leaf}" for part, leaf in itertools.product(("norm", "to_qkv", "proj"), leaves)]
    found = [f"{part}.{leaf}" for part, leaf in itertools.product(("conv1", "conv2"), leaves)]
    for half, stages in (("encoder", "downsamples"), ("decoder", "upsamples")):
        found += [f"{half}.{part}.{leaf}" for part, leaf in itertools.product(("conv1", "head.0", "head.2"), leaves)]
        parts = [*(f"middle.{i}" for i in range(3)), *(f"{stages}.{i}" for i in range(15))]
        found += [f"{half}.{part}.{name}" for part, name in itertools.product(parts, inner)]
    return found


def native_text_encoder(umt5: nn.Module) -> dict[str, Tensor]:
    """UMT5EncoderModel's tensors under the names of models_t5_umt5-xxl-enc-bf16.pth, the embedding once."""
    top = {theirs: ours for ours, theirs in WAN_TOP_LEVEL.items()}
    within = {theirs: ours for ours, theirs in WAN_IN_BLOCK.items()}
    renamed: dict[str, Tensor] = {}
    for name, value in umt5.state_dict().items():
        stem = name.rpartition(".")[0]
        if name.startswith("encoder.block."):
            number, rest = stem.removeprefix("encoder.block.").split(".", 1)
            renamed[f"blocks.{number}.{within[rest]}.weight"] = value
        elif stem in top:
            renamed[f"{top[stem]}.weight"] = value
    return renamed
