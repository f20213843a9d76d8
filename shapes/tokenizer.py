"""The small model's tokenizer: UMT5's special tokens and byte fallback, and the words of the captions.

Any text survives: a word that no caption uses is spelt in letters. The file knows no model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from shapes import captions, commands
from shapes.world import COLOURS

SPECIAL = ("<pad>", "</s>", "<unk>")
ENDINGS = ("ing", "ed", "er", "ly", "es", "al", "th", "an", "in", "on", "re", "st", "en", "or", "ar", "s", ".", ",")
TOKENIZER = Path("google") / "umt5-xxl"  # in a model's folder
MAX_TOKENS = 48  # a caption has at most 25; the transformer's text_len


def words() -> list[str]:
    """Every word that a caption can hold, in both spellings of its first letter."""
    found = {word for text in _wording() for word in re.findall(r"[a-z]+", text)}
    return sorted(found | {word.capitalize() for word in found})


def _wording() -> Iterator[str]:
    tables = (captions.NOUNS, captions.ADJECTIVES, captions.VERBS)
    yield from (text for table in tables for options in table.values() for text in options)
    yield from (*captions.GO, *captions.PASSING, *captions.OPENINGS, *COLOURS, "an")
    yield from commands.wording()


def build_tokenizer() -> Tokenizer:
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["▁", *letters, *ENDINGS, *(f"▁{word}" for word in words())]
    scored = [(piece, -10.0 + 2.0 * min(len(piece) - 1, 4)) for piece in dict.fromkeys(pieces)]
    vocabulary = [*((token, 0.0) for token in SPECIAL), *scored, *((f"<0x{i:02X}>", -30.0) for i in range(256))]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def tokenizer_files() -> dict[str, str]:
    """The content of tokenizer.json and of its two companions."""
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    companions = {"special_tokens_map.json": names, "tokenizer_config.json": settings}
    written = {file: json.dumps(content, indent=2) + "\n" for file, content in companions.items()}
    return {"tokenizer.json": build_tokenizer().to_str(pretty=True), **written}
