"""Names of the text encoder's parameters: from those of Wan's file to those of transformers' UMT5EncoderModel."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

TABLES = ("shared", "encoder.embed_tokens")  # the embedding, which has two names
SHARED, EMBED_TOKENS = (f"{table}.weight" for table in TABLES)

WAN_TOP_LEVEL = {"norm": "encoder.final_layer_norm", "token_embedding": "shared"}
WAN_IN_BLOCK = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


def wan_to_transformers(name: str) -> str:
    """A tensor's name in Wan's file to its name in UMT5EncoderModel; a name that has no counterpart stays."""
    stem, _, leaf = name.rpartition(".")
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", stem)
    if block is not None and block[2] in WAN_IN_BLOCK:
        return f"encoder.block.{block[1]}.{WAN_IN_BLOCK[block[2]]}.{leaf}"
    return f"{WAN_TOP_LEVEL[stem]}.{leaf}" if stem in WAN_TOP_LEVEL else name


def to_transformers(state: Mapping[str, T]) -> dict[str, T]:
    """The encoder's tensors under transformers' names, from those or from Wan's, the embedding under both of its."""
    renamed = {wan_to_transformers(name): tensor for name, tensor in state.items()}
    for name in list(renamed):
        stem, _, leaf = name.rpartition(".")
        if stem == TABLES[0] or (stem == TABLES[1] and f"{TABLES[0]}.{leaf}" not in renamed):
            renamed |= {f"{table}.{leaf}": renamed[name] for table in TABLES}
    return renamed
