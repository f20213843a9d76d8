"""The two layouts in which Wan's transformer is published: Wan's own folder and Diffusers' `transformer/` folder.

Both are brought to Wan's names and to the keys of Wan's config.json, so that the rest of the program knows one
layout only. Which of the two it is, is read off the content, not off the folder's name. This file does not know the
model; it renames.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from torch import Tensor

from utils.errors import InputError
from wan.checkpoints.files import INDEX_SUFFIX, missing_file, read_json, read_tensors, stripped_tensors

WEIGHTS = "diffusion_pytorch_model"
SUBFOLDER = "transformer"

TOP_LEVEL = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "patch_embedding": "patch_embedding",
    "proj_out": "head.head",
}
IN_BLOCK = {
    "norm2": "norm3",  # the one LayerNorm with weights: Wan counts it third, Diffusers second
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
IN_ATTENTION = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}
ATTENTION = {"attn1": "self_attn", "attn2": "cross_attn"}

# Diffusers' configuration keys that have the same meaning under another name in Wan's config.json.
CONFIG_KEYS = {
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    "num_attention_heads": "num_heads",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "text_dim": "text_dim",
    "num_layers": "num_layers",
    "eps": "eps",
    "cross_attn_norm": "cross_attn_norm",
    "patch_size": "patch_size",
}


def is_diffusers_state(state: Mapping[str, object]) -> bool:
    """Whether the names are those of Diffusers' WanTransformer3DModel."""
    return any(name.startswith("condition_embedder.") for name in state)


def diffusers_to_wan(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under Wan's names. A name that has no counterpart stays, for the strict comparison to report."""
    return {_wan_name(name): tensor for name, tensor in state.items()}


def _wan_name(name: str) -> str:
    if name == "scale_shift_table":
        return "head.modulation"
    block = re.fullmatch(r"(blocks\.\d+)\.(.+)", name)
    if block is not None:
        inner = _wan_name_in_block(block[2])
        return name if inner is None else f"{block[1]}.{inner}"
    stem, _, leaf = name.rpartition(".")
    return f"{TOP_LEVEL[stem]}.{leaf}" if stem in TOP_LEVEL else name


def _wan_name_in_block(name: str) -> str | None:
    if name == "scale_shift_table":
        return "modulation"
    stem, _, leaf = name.rpartition(".")
    if stem in IN_BLOCK:
        return f"{IN_BLOCK[stem]}.{leaf}"
    attention, _, part = stem.partition(".")
    if attention in ATTENTION and part in IN_ATTENTION:
        return f"{ATTENTION[attention]}.{IN_ATTENTION[part]}.{leaf}"
    return None


def read_model_state(folder: Path) -> dict[str, Tensor]:
    """The transformer's tensors under Wan's names, mapped into memory.

    Found are `diffusion_pytorch_model*.safetensors`, one file or shards with their index, in `folder` or in
    `folder/transformer`. Raises InputError when neither has them.
    """
    path = _weights_in(folder) or _weights_in(folder / SUBFOLDER)
    if path is None:
        raise missing_file(folder / f"{WEIGHTS}.safetensors")
    state = stripped_tensors(read_tensors(path), path)
    return diffusers_to_wan(state) if is_diffusers_state(state) else state


def _weights_in(folder: Path) -> Path | None:
    candidates = (folder / f"{WEIGHTS}{INDEX_SUFFIX}", folder / f"{WEIGHTS}.safetensors")
    found = next((path for path in candidates if path.is_file()), None)
    if found is None and any(folder.glob(f"{WEIGHTS}-*-of-*.safetensors")):
        raise missing_file(candidates[0])
    return found


def read_model_config(folder: Path) -> dict[str, object]:
    """The transformer's sizes under the keys of Wan's config.json (dim, ffn_dim, num_heads, num_layers, ...).

    Read is `folder/config.json`, else `folder/transformer/config.json`; Diffusers' keys are translated, keys that
    begin with an underscore left out. Raises InputError when there is none or when it is that of another model.
    """
    nested = folder / SUBFOLDER / "config.json"
    path = nested if nested.is_file() and not (folder / "config.json").is_file() else folder / "config.json"
    config = {key: value for key, value in read_json(path).items() if not key.startswith("_")}
    return _native_config(config, path) if "attention_head_dim" in config else config


def _native_config(config: Mapping[str, object], path: Path) -> dict[str, object]:
    absent = [key for key in ("num_attention_heads", "attention_head_dim", "num_layers") if key not in config]
    if absent:
        raise InputError(f"{path} lacks {', '.join(absent)}.")
    for key in ("image_dim", "added_kv_proj_dim"):
        if config.get(key) is not None:
            raise InputError(f"{path}: {key} is {config[key]}: an image-to-video model; text-to-video is wanted.")
    native: dict[str, object] = {native: config[key] for key, native in CONFIG_KEYS.items() if key in config}
    native["dim"] = cast("int", config["num_attention_heads"]) * cast("int", config["attention_head_dim"])
    native["qk_norm"] = config.get("qk_norm", True) is not None
    native["model_type"] = "t2v"
    return native
