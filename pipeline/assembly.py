"""From a configuration and its prompts to a pipeline that is ready: the order in which large parts come and go."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from pipeline.config.config import InferenceConfig, geometry_of
from pipeline.planning.memory_advice import is_out_of_memory, out_of_memory
from pipeline.planning.plan import choose_strategy
from pipeline.runtime.decoding import start_decoder
from pipeline.runtime.engine import choose_engine, start_engine, use_compile_cache
from pipeline.runtime.generator import BlockGenerator
from pipeline.runtime.loading import (
    check_before_loading,
    choose_dtype,
    choose_vae_device,
    encode_prompts,
    load_decoder,
    load_encoder,
    load_transformer,
    require_files,
)
from pipeline.runtime.speed import at_speed
from pipeline.runtime.video_pipeline import VideoPipeline

logger = logging.getLogger(__name__)


def assemble(
    config: InferenceConfig, prompts: Sequence[str], device: torch.device, batch: int = 1
) -> tuple[VideoPipeline, dict[str, Tensor]]:
    """The pipeline, ready for `batch` videos at a time, and the embeddings of `prompts`; the text encoder has come and
    gone before the rest is loaded.

    Raises InputError, before anything large is read, if a file is missing or does not fit.
    """
    require_files(config)
    sizes, settings = check_before_loading(config, device)
    if config.preview_path is not None:
        logger.warning(
            "decoder: %s is for previews: these videos are of less quality than with decoder=wan. How much is lost, "
            "`python -m benchmarks.vae --preview FILE --vae FILE --video FILE` measures.",
            config.preview_path,
        )
    embeds = encode_prompts(config, prompts, sizes.text_len, device)
    dtype = choose_dtype(config, device)
    use_compile_cache(None if config.compile_cache is None else Path(config.compile_cache))
    generator = BlockGenerator(load_transformer(config, sizes, device, dtype), settings)
    geometry = geometry_of(config, sizes.in_dim)
    start_engine(generator, config.engine, geometry, batch)
    speed = config.dummy_forcing.equal_cost
    if config.dummy_forcing.enabled and isinstance(speed, float):
        generator.settings = at_speed(generator, geometry, speed)
    strategy = choose_strategy(config, generator.settings, device)  # the settings now say how large the cache becomes
    vae = load_decoder(config, choose_vae_device(config, device), dtype)
    pipeline = VideoPipeline(generator, vae, config, strategy, load_encoder(config, vae))
    if pipeline.strategy.on_side_stream and pipeline.strategy.tile is None:
        latents = torch.zeros(batch, *geometry.block_shape, device=device)
        start_decoder(vae, choose_engine(config.engine, vae.device), config.engine != "auto", latents)
    return pipeline, embeds


@contextmanager
def memory_explained(config: InferenceConfig, device: torch.device) -> Iterator[None]:
    """Within the context, memory that does not suffice becomes an InputError that says what would fit."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise out_of_memory(config, device) from error
        raise
