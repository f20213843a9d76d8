"""The two models behind a video's latents: the text encoder and the causal transformer, with their sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from shapes.forward import TrainingForward, init_
from shapes.tokenizer import MAX_TOKENS, build_tokenizer
from wan.config import ModelConfig
from wan.transformer.model import CausalWanModel

TEXT_SIZES: dict[str, Any] = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
SIZES = ModelConfig(
    dim=192, ffn_dim=768, num_heads=6, num_layers=4, freq_dim=64, text_dim=TEXT_SIZES["d_model"], text_len=MAX_TOKENS
)
INIT_SEED = 21
CONFIG_FILE = "config.json"
TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TRANSFORMER_FILE = "diffusion_pytorch_model.safetensors"
VAE_FILE = "Wan2.1_VAE.pth"


class TextEncoder(nn.Module):
    """A small UMT5 with its tokenizer: captions to embeddings."""

    def __init__(self) -> None:
        from transformers import UMT5Config, UMT5EncoderModel

        super().__init__()
        self.tokenizer = build_tokenizer()
        vocabulary = self.tokenizer.get_vocab_size()
        config = UMT5Config(vocab_size=vocabulary, feed_forward_proj="gated-gelu", dropout_rate=0.0, **TEXT_SIZES)
        self.umt5 = cast(nn.Module, UMT5EncoderModel(config))

    def forward(self, captions: Sequence[str]) -> Tensor:
        """[B, text_len, text_dim], zero past each caption."""
        hidden, _ = self.read(captions)
        return nn.functional.pad(hidden, (0, 0, 0, MAX_TOKENS - hidden.shape[1]))

    def read(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """[B, longest, text_dim], zero past each caption, and the mask [B, longest] of its tokens."""
        device = next(self.parameters()).device
        ids, mask = (part.to(device) for part in token_ids(self.tokenizer, captions))
        return self.umt5(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None], mask


class Flow(TrainingForward):
    """The transformer that is trained, with fresh weights."""

    def __init__(self, compile_layers: bool = False) -> None:
        super().__init__(init_(CausalWanModel(SIZES), INIT_SEED), compile_layers)


def token_ids(tokenizer: Tokenizer, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, longest]; captions end with </s>."""
    rows = [tokenizer.encode(text).ids for text in captions]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    return ids, mask
