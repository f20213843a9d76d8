"""The two layouts in which Wan's transformer is published: Wan's own names and those of Diffusers' `transformer/`.

Both are brought to Wan's names and to the keys of Wan's config.json, so that the rest of the program knows one
layout only. Which of the two it is, is read off the content, not off a folder's or file's name. This file does not
know the model; it renames.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from utils.errors import InputError, shown
from wan.checkpoints.files import read_json, usual_weights, weights_in
from wan.checkpoints.reading import read_tensors
from wan.checkpoints.state import generator_state

SUBFOLDER = "transformer"
T = TypeVar("T")

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
BLOCK = re.compile(r"(blocks\.\d+)\.(.+)")
_IN_ATTENTIONS = {
    f"{ours}.{part}": f"{theirs}.{their_part}"
    for theirs, ours in ATTENTION.items()
    for their_part, part in IN_ATTENTION.items()
}
_TO_DIFFUSERS = {ours: theirs for theirs, ours in {**TOP_LEVEL, **IN_BLOCK}.items()} | _IN_ATTENTIONS

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
    return any(name.startswith("condition_embedder.") or ".attn1.to_q." in name for name in state)


def to_wan(state: Mapping[str, T]) -> dict[str, T]:
    """The same values under Wan's names, from those or from Diffusers'.

    A name that has no counterpart stays, for the strict comparison to report.
    """
    if not is_diffusers_state(state):
        return dict(state)
    return {wan_name(name): value for name, value in state.items()}


def wan_name(name: str) -> str:
    """Wan's name of a tensor that Diffusers calls `name`; any other name stays."""
    if name == "scale_shift_table":
        return "head.modulation"
    block = BLOCK.fullmatch(name)
    if block is not None:
        inner = _wan_name_in_block(block[2])
        return name if inner is None else f"{block[1]}.{inner}"
    stem, _, leaf = name.rpartition(".")
    return f"{TOP_LEVEL[stem]}.{leaf}" if stem in TOP_LEVEL else name


def diffusers_layer(layer: str) -> str:
    """Diffusers' name of a layer (a name without `.weight`) that Wan calls `layer`; any other name stays."""
    block = BLOCK.fullmatch(layer)
    if block is None:
        return _TO_DIFFUSERS.get(layer, layer)
    return f"{block[1]}.{_TO_DIFFUSERS.get(block[2], block[2])}"


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


def read_generator(path: Path, use_ema: bool) -> dict[str, Tensor]:
    """The transformer's tensors under Wan's names, mapped into memory, with the scales of quantised ones.

    `path` is a file, or a folder with the weights or with a folder `transformer/` that has them. `use_ema` chooses
    where a file has both. Raises InputError.
    """
    source = path if path.is_file() else _weights(path)
    return to_wan(generator_state(read_tensors(source), use_ema, source))


def _weights(folder: Path) -> Path:
    """The weights in a folder, else in its `transformer/`."""
    nested = folder / SUBFOLDER
    return usual_weights(folder) or weights_in(nested if nested.is_dir() else folder)


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
    heads, width = config.get("num_attention_heads"), config["attention_head_dim"]
    if not isinstance(heads, int) or not isinstance(width, int) or "num_layers" not in config:
        wanted = "num_attention_heads, attention_head_dim and num_layers"
        raise InputError(f"{shown(path)}: {wanted} must be there as integers, as Diffusers writes them.")
    for key in ("image_dim", "added_kv_proj_dim"):
        if config.get(key) is not None:
            raise InputError(
                f"{shown(path)}: {key} is {shown(config[key], 40)}: an image-to-video model; text-to-video is wanted."
            )
    native: dict[str, object] = {native: config[key] for key, native in CONFIG_KEYS.items() if key in config}
    native["dim"] = heads * width
    native["qk_norm"] = config.get("qk_norm", True) is not None
    native["model_type"] = "t2v"
    return native
