"""From a configuration and its prompts to a pipeline that is ready: the order in which large parts come and go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pipeline.config import InferenceConfig
from pipeline.generator import BlockGenerator
from pipeline.loading import (
    check_before_loading,
    choose_dtype,
    encode_prompts,
    load_transformer,
    load_vae,
    require_files,
)
from pipeline.plan import choose_tile
from pipeline.remedies import is_out_of_memory, out_of_memory
from pipeline.video_pipeline import VideoPipeline


def assemble(
    config: InferenceConfig, prompts: Sequence[str], device: torch.device
) -> tuple[VideoPipeline, dict[str, Tensor]]:
    """The pipeline, and the embeddings of `prompts`; the text encoder has come and gone before the rest is loaded.

    Raises InputError, before anything large is read, if a file is missing or does not fit.
    """
    require_files(config)
    sizes, settings = check_before_loading(config, device)
    embeds = encode_prompts(config, prompts, sizes.text_len, device)
    dtype = choose_dtype(config, device)
    generator = BlockGenerator(load_transformer(config, sizes, device, dtype), settings)
    vae = load_vae(config, device, dtype)
    return VideoPipeline(generator, vae, config, choose_tile(config, settings, device)), embeds


@contextmanager
def memory_explained(config: InferenceConfig, device: torch.device) -> Iterator[None]:
    """Within the context, memory that does not suffice becomes an InputError that says what would fit."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise out_of_memory(config, device) from error
        raise
