"""Prompts to embeddings, with a text encoder that is there only while it is needed.

It is the largest model by far (10.6 GiB in bf16). Prompts that are known before the transformer is loaded are encoded
first, and the encoder is gone when the rest comes. A prompt that comes later brings it back, where memory allows; it
then stays for the next one, unless memory is to be saved.
"""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import Tensor

from pipeline.config.config import InferenceConfig
from pipeline.runtime.loading import choose_dtype, text_encoder_place
from wan.attention.exchange import HeadExchange
from wan.text import TextEncoder

REMEMBERED = 4096  # embeddings of at most 4 MiB; typed prompts must not fill the memory, those of a run stay


class PromptEncoder:
    """Embeddings [length, text_dim] of prompts, on the CPU; may be called from several threads."""

    def __init__(self, config: InferenceConfig, device: torch.device, max_length: int) -> None:
        """Prompts are cut to `max_length` tokens, what the transformer takes. `device` is that of the run."""
        self._config = config
        self._device = device
        self._max_length = max_length
        self._stays = config.low_memory is not True
        self._encoder: TextEncoder | None = None
        self._embeds: OrderedDict[str, Tensor] = OrderedDict()
        self._most = REMEMBERED
        self._lock = threading.Lock()

    def __call__(self, prompt: str) -> Tensor:
        """The embedding of a prompt; loads the text encoder if it is neither there nor was needed before.

        Raises InputError for files that are missing or do not fit.
        """
        with self._lock:
            if prompt not in self._embeds:
                self._encode([prompt])
                if not self._stays:
                    self._free()
            self._embeds.move_to_end(prompt)
            return self._embeds[prompt]

    def prepare(self, prompts: Iterable[str]) -> None:
        """Encode prompts that will be asked for, and free the text encoder."""
        with self._lock:
            fresh = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._embeds]
            self._most = max(self._most, len(self._embeds) + len(fresh) + REMEMBERED)
            if fresh:
                self._encode(fresh)
            self._free()

    def share(self, exchange: HeadExchange) -> None:
        """Let all processes that make a video together have the embeddings of the first; all of them call this."""
        self._embeds = exchange.from_first(self._embeds)
        self._most = max(self._most, len(self._embeds) + REMEMBERED)

    def free(self) -> None:
        """Free the text encoder, and forget the embeddings."""
        with self._lock:
            self._embeds.clear()
            self._free()

    def _encode(self, prompts: Iterable[str]) -> None:
        if self._encoder is None:
            place = text_encoder_place(self._config, self._device)
            dtype = choose_dtype(self._config, self._device)  # wherever it is: float32 would take 22.7 GB
            files = self._config.text_encoder_path, self._config.tokenizer_path
            self._encoder = TextEncoder.load(*files, dtype, place, self._max_length)
        for prompt in prompts:
            self._embeds[prompt] = self._encoder.encode([prompt])[0].cpu()
        while len(self._embeds) > self._most:
            self._embeds.popitem(last=False)

    def _free(self) -> None:
        if self._encoder is None:
            return
        self._encoder = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
