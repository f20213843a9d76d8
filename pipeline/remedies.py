"""What would fit when memory did not suffice: settings that need less, in the order in which they hurt."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import torch

from pipeline.config import InferenceConfig
from pipeline.loading import generator_settings
from pipeline.plan import planner_for
from utils.errors import InputError
from utils.memory import format_bytes
from wan.config import ModelKwargs

SMALLER = (720, 480, (320, 576), (256, 448))


def _candidates(config: InferenceConfig) -> Iterator[tuple[str, InferenceConfig]]:
    if config.precision == "fp32":
        yield "precision=bf16", replace(config, precision="bf16")
    changes: dict[str, object] = {}
    if config.policy == "full":
        window = ModelKwargs(12, config.model_kwargs.timestep_shift, 3)
        changes["model_kwargs"] = window
        text = "model_kwargs.local_attn_size=12 model_kwargs.sink_size=3"
        yield text, replace(config, model_kwargs=window)
    for resolution in SMALLER:
        smaller = replace(config, resolution=resolution)
        if smaller.pixel_size < config.pixel_size:
            shown = list(resolution) if isinstance(resolution, tuple) else resolution
            yield f"resolution={str(shown).replace(' ', '')}", smaller


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch or Python means by it that memory did not suffice, on a GPU or on the CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def memory_of(device: torch.device) -> int:
    """Bytes of memory that the device has in all."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    try:
        import resource  # not on Windows
    except ImportError:
        return pages
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return pages if limit == resource.RLIM_INFINITY else min(pages, limit)


def out_of_memory(config: InferenceConfig, device: torch.device) -> InputError:
    """The error for a run that needed more memory than the device has; names overrides that need less."""
    planner = planner_for(config, device)
    available = memory_of(device)

    def peak(candidate: InferenceConfig) -> int:
        return planner.memory(candidate, generator_settings(candidate, planner.sizes)).peak

    fitting = [(text, size) for text, candidate in _candidates(config) if (size := peak(candidate)) < available]
    advice = "; ".join(f"{text} ({format_bytes(size)})" for text, size in fitting)
    return InputError(
        f"device: {device} ran out of memory. This run takes about {format_bytes(peak(config))} of tensors, "
        f"{device} has {format_bytes(available)}, and other programs may hold some of it. "
        + (f"These overrides need less: {advice}" if advice else "No smaller setting of this model would fit.")
    )
