"""Prompts to embeddings: cleaning, tokens, and the UMT5 encoder.

The layers are transformers' UMT5EncoderModel; this file loads them from Wan's file or from a Diffusers
`text_encoder/` folder, with sizes read off the tensors, and reads the tokenizer's `tokenizer.json` as it stands,
never online. The encoder is by far the largest model of all (10.6 GiB in bf16): whoever holds it encodes every prompt
first and lets it go. It does not know how the embeddings are used.

Source: UMT5 (arXiv 2304.09151) as Wan 2.1 (arXiv 2503.20314) uses it.
"""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from utils.errors import InputError, shown
from wan.checkpoints.files import (
    MOST_JSON,
    download_hint,
    identify_hint,
    missing_file,
    require_size,
    some_names,
    weights_in,
)
from wan.checkpoints.filling import load_into, loading_bytes
from wan.checkpoints.reading import read_tensors
from wan.checkpoints.state import TEXT_ENCODER_PREFIXES, opened, stripped_tensors
from wan.checkpoints.text_names import EMBED_TOKENS, SHARED, to_transformers

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

MAX_LENGTH = 512
# Not to be read off any tensor's shape; the same in every UMT5.
MAX_DISTANCE = 128


def clean_prompt(text: str) -> str:
    """A prompt as the encoder was trained to see it: mended Unicode, no HTML entities, single spaces."""
    import ftfy

    # Twice, because scraped captions are often escaped twice ("&amp;amp;").
    unescaped = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", unescaped.strip()).strip()


def pad(embeds: Sequence[Tensor], length: int) -> Tensor:
    """Embeddings of different lengths, each [length_i, d], to one tensor [B, length, d] with zeros past each prompt."""
    longest = max(len(embed) for embed in embeds)
    assert longest <= length, f"an embedding of {longest} tokens does not fit in {length}"
    padded = embeds[0].new_zeros(len(embeds), length, embeds[0].shape[-1])
    for row, embed in zip(padded, embeds, strict=True):
        row[: len(embed)] = embed
    return padded


class PromptTokenizer:
    """A `tokenizer.json` and the rule of exactly `max_length` ids, `</s>` last even when the prompt is cut."""

    def __init__(self, tokenizer: Tokenizer, source: Path, max_length: int = MAX_LENGTH) -> None:
        end, padding = tokenizer.token_to_id("</s>"), tokenizer.token_to_id("<pad>")
        if end is None or padding is None:
            raise InputError(
                f"{shown(source)} has no </s> or no <pad>: it is not UMT5's tokenizer. {download_hint(source)}"
            )
        self._tokenizer = tokenizer
        self._end, self._padding = end, padding
        self.max_length = max_length
        self.vocabulary = max(tokenizer.get_vocab().values()) + 1  # not their number: ids may leave gaps

    @classmethod
    def load(cls, folder: Path, max_length: int = MAX_LENGTH) -> PromptTokenizer:
        """From a folder (google/umt5-xxl, or Diffusers' tokenizer/) with a tokenizer.json. Raises InputError."""
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            if (folder / "spiece.model").is_file():
                raise InputError(
                    f"{shown(folder)} has spiece.model but no tokenizer.json, which is the one that is read. "
                    f"{download_hint(path)}"
                )
            raise missing_file(path)
        require_size(path, MOST_JSON)
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises bare Exception, or its own panic, which is no Exception
            raise InputError(
                f"{shown(path)} cannot be read as a tokenizer ({shown(error)}). {download_hint(path)}"
            ) from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return cls(tokenizer, path, max_length)

    def ids(self, prompt: str) -> list[int]:
        """The ids of a cleaned prompt with `</s>`, at most `max_length`; a warning says how many were cut."""
        ids = self._tokenizer.encode(prompt, add_special_tokens=False).ids
        room = self.max_length - 1
        if len(ids) > room:
            logger.warning(
                "A prompt of %d tokens is longer than %d; its last %d tokens are cut: %.60s...",
                len(ids) + 1,
                self.max_length,
                len(ids) - room,
                prompt,
            )
        return [*ids[:room], self._end]

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Prompts, cleaned here, to ids and mask (1 for the prompt, 0 past it), both int64 [B, max_length]."""
        rows = [self.ids(clean_prompt(prompt)) for prompt in prompts]
        ids = torch.full((len(rows), self.max_length), self._padding, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
            mask[i, : len(row)] = 1
        return ids, mask


class TextEncoder:
    """UMT5 with its tokenizer. Embeddings are [length, d_model], `length` the prompt's own, on the encoder's device."""

    def __init__(self, module: nn.Module, tokenizer: PromptTokenizer) -> None:
        self.module = module
        self.tokenizer = tokenizer

    @classmethod
    def load(
        cls,
        checkpoint: Path,
        tokenizer: Path,
        dtype: torch.dtype,
        device: torch.device | str,
        max_length: int = MAX_LENGTH,
    ) -> TextEncoder:
        """From a file in Wan's or transformers' names or a `text_encoder/` folder, and a folder with tokenizer.json.

        Raises InputError: a file is missing or damaged, names or shapes do not fit, or the tokenizer has more tokens
        than the encoder.
        """
        prompt_tokenizer = PromptTokenizer.load(tokenizer, max_length)
        path = weights_in(checkpoint) if checkpoint.is_dir() else checkpoint
        state = _read_encoder(path)
        module = load_encoder(state, dtype, device, path)
        vocabulary = module.get_parameter(SHARED).shape[0]
        if prompt_tokenizer.vocabulary > vocabulary:
            raise InputError(
                f"{shown(tokenizer)} has {prompt_tokenizer.vocabulary} tokens and {shown(path)} only {vocabulary} "
                f"embeddings: they do not belong together. {download_hint(path)}"
            )
        return cls(module, prompt_tokenizer)

    @property
    def width(self) -> int:
        """d_model, the numbers of an embedding."""
        return self.module.get_parameter(SHARED).shape[1]

    def to(self, device: torch.device | str) -> TextEncoder:
        """Move the encoder."""
        self.module.to(device)
        return self

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """The embeddings of prompts, each [length, d_model] without the zeros past it (see `pad`).

        Prompts are cleaned, and go through the encoder one by one at their own length: padding is masked out and so
        changes nothing, and a prompt's embedding does not depend on the prompts beside it.
        """
        ids, mask = self.tokenizer(prompts)
        lengths = [int(length) for length in mask.sum(dim=1).tolist()]
        return [
            self.embed(row[None, :length], keep[None, :length])[0]
            for row, keep, length in zip(ids, mask, lengths, strict=True)
        ]

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Ids and mask [B, L] to embeddings [B, L, d_model], zero where the mask is."""
        return embed(self.module, input_ids, attention_mask)


@torch.no_grad()
def embed(module: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Ids and mask [B, L] through a UMT5 encoder to embeddings [B, L, d_model], zero where the mask is."""
    device = module.get_parameter(SHARED).device
    mask = attention_mask.to(device)
    output = module(input_ids=input_ids.to(device), attention_mask=mask)
    return cast("Tensor", output.last_hidden_state) * mask.unsqueeze(-1)


def _read_encoder(path: Path) -> dict[str, Tensor]:
    return stripped_tensors(opened(read_tensors(path))[1], path, TEXT_ENCODER_PREFIXES)


def encoder_bytes(checkpoint: Path, dtype: torch.dtype) -> int:
    """What loading the encoder of a file or folder takes on its device. Raises InputError if it is none."""
    path = weights_in(checkpoint) if checkpoint.is_dir() else checkpoint
    return loading_bytes(to_transformers(_read_encoder(path)), dtype)


def infer_config(state: Mapping[str, Tensor], source: Path) -> dict[str, int]:
    """UMT5Config's sizes from the shapes of its tensors, under transformers' names. Raises InputError."""
    first = "encoder.block.0.layer"
    names = {
        "embedding": SHARED,
        "query": f"{first}.0.SelfAttention.q.weight",
        "bias": f"{first}.0.SelfAttention.relative_attention_bias.weight",
        "ffn": f"{first}.1.DenseReluDense.wi_0.weight",
    }
    absent = [name for name in names.values() if name not in state or state[name].ndim != 2]
    if absent:
        raise InputError(
            f"{shown(source)} is not a UMT5 encoder: it lacks {some_names(absent)} (transformers' names). "
            f"{identify_hint(source)}"
        )
    shapes = {role: state[name].shape for role, name in names.items()}
    layers = {name.split(".")[2] for name in state if name.startswith("encoder.block.")}
    heads = max(shapes["bias"][1], 1)
    return {
        "vocab_size": shapes["embedding"][0],
        "d_model": shapes["embedding"][1],
        "d_kv": shapes["query"][0] // heads,
        "d_ff": shapes["ffn"][0],
        "num_layers": len(layers),
        "num_heads": heads,
        "relative_attention_num_buckets": shapes["bias"][0],
    }


def build_encoder(sizes: Mapping[str, int]) -> nn.Module:
    """UMT5EncoderModel of these sizes on the meta device."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=sizes["vocab_size"],
        d_model=sizes["d_model"],
        d_kv=sizes["d_kv"],
        d_ff=sizes["d_ff"],
        num_layers=sizes["num_layers"],
        num_heads=sizes["num_heads"],
        relative_attention_num_buckets=sizes["relative_attention_num_buckets"],
        relative_attention_max_distance=MAX_DISTANCE,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        return cast("nn.Module", UMT5EncoderModel(config)).eval()


def load_encoder(
    state: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str, source: Path
) -> nn.Module:
    """UMT5EncoderModel with the tensors of `state` (Wan's or transformers' names) of `dtype` on `device`."""
    renamed = to_transformers(state)
    module = build_encoder(infer_config(renamed, source))
    load_into(module, renamed, source, dtype, device)
    # Tied by hand: some transformers 5 releases leave the second table zero, and every prompt would mean the same.
    module.get_submodule("encoder").set_submodule("embed_tokens", module.get_submodule("shared"))
    assert module.get_parameter(SHARED) is module.get_parameter(EMBED_TOKENS)
    return module
