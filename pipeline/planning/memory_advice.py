"""What would fit when memory did not suffice: settings that need less, in the order in which they hurt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice

import torch

from pipeline.config.config import InferenceConfig
from pipeline.planning.memory_plan import MemoryPlan
from pipeline.planning.plan import planner_for
from pipeline.planning.together import Room, TogetherPlanner
from pipeline.runtime.loading import generator_settings, text_encoder_place
from utils.errors import InputError
from utils.memory import format_bytes, memory_of

SMALLER = (720, 480, (320, 576), (256, 448), (128, 208))
WINDOW, SINKS = 12, 3  # latent frames; the setting with which the published checkpoints were trained
SHOWN = 3


@dataclass(frozen=True)
class Remedy:
    """Overrides, as they are typed, and the configuration with them; `batch` videos at a time."""

    overrides: tuple[str, ...]
    config: InferenceConfig
    batch: int

    def then(self, override: str, config: InferenceConfig) -> Remedy:
        return Remedy((*self.overrides, override), config, self.batch)

    def __str__(self) -> str:
        return " ".join(self.overrides)


def remedies(config: InferenceConfig, device: torch.device, batch: int = 1) -> Iterator[Remedy]:
    """Settings that need less, each on top of those before it; resolutions instead of one another."""
    step = Remedy((), config, batch)
    if device.type != "cpu" and text_encoder_place(config, device) == device:
        step = step.then("text_encoder_device=cpu", replace(step.config, text_encoder_device="cpu"))
        yield step
    if batch > 1:
        step = Remedy((*step.overrides, "samples_per_batch=1"), replace(step.config, samples_per_batch=1), 1)
        yield step
    if config.precision == "fp32" or (config.precision == "auto" and device.type == "cpu"):
        step = step.then("precision=bf16", replace(step.config, precision="bf16"))
        yield step
    if config.policy in ("full", "prune") and config.model_kwargs.local_attn_size == -1:
        size = max(WINDOW, SINKS + config.num_frame_per_block)
        window = replace(config.model_kwargs, local_attn_size=size, sink_size=SINKS)
        override = f"model_kwargs.local_attn_size={size} model_kwargs.sink_size={SINKS}"
        step = step.then(override, replace(step.config, model_kwargs=window))
        yield step
    for resolution in SMALLER:
        smaller = replace(step.config, resolution=resolution)
        if smaller.latent_size < config.latent_size:
            yield step.then(f"resolution={str(resolution).translate({40: '[', 41: ']', 32: None})}", smaller)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch or Python means by it that memory did not suffice, on a GPU or on the CPU."""
    said = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in said for words in ("can't allocate memory", "Cannot allocate memory", "not enough memory")
    )


def bytes_needed(config: InferenceConfig, device: torch.device, batch: int = 1, ranks: int = 1) -> int:
    """The most that a run of `ranks` processes together holds on the device of one at once, as tensors."""
    planner = planner_for(config, device)
    settings = generator_settings(config, planner.sizes)
    if ranks > 1:
        together = TogetherPlanner(planner, config, settings, ranks, batch).fitting(Room.here(config, device, ranks))
        plan = together.most
    else:
        _, plan = planner.fitting(config, settings, memory_of(device), batch)
    return most_at_once(plan, config, device)


def most_at_once(plan: MemoryPlan, config: InferenceConfig, device: torch.device) -> int:
    """Bytes of tensors on the device: of the video, or of the text encoder before it."""
    return max(plan.peak, plan.text_encoder if text_encoder_place(config, device) == device else 0)


def out_of_memory(config: InferenceConfig, device: torch.device, batch: int = 1, ranks: int = 1) -> InputError:
    """The error for a run of `batch` videos at a time, by so many processes together, that needed more memory than the
    device has; names overrides that need less."""
    needed = bytes_needed(config, device, batch, ranks)
    return InputError(f"device: {device} ran out of memory. {_advice(config, device, needed, batch, ranks)}")


def shortage(
    plan: MemoryPlan, config: InferenceConfig, device: torch.device, batch: int = 1, ranks: int = 1
) -> str | None:
    """What a run that is planned so would take, what the device has, and what needs less, if it cannot hold the run."""
    needed = most_at_once(plan, config, device)
    if needed <= Room.here(config, device, ranks).own:
        return None
    return f"{device} has not the memory for it. {_advice(config, device, needed, batch, ranks)}"


def _advice(config: InferenceConfig, device: torch.device, needed: int, batch: int, ranks: int) -> str:
    available = Room.here(config, device, ranks).own
    changes = remedies(config, device, batch)
    sized = ((remedy, bytes_needed(remedy.config, device, remedy.batch, ranks)) for remedy in changes)
    fitting = (f"{remedy} ({format_bytes(size)})" for remedy, size in sized if size < min(available, needed))
    advice = "; ".join(islice(fitting, SHOWN))
    has = f"{device} has {format_bytes(available)}" + (f" for each of {ranks} processes" if ranks > 1 else "")
    return (
        f"This run takes about {format_bytes(needed)} of tensors, {has}, and programs and libraries hold some of it. "
        + (f"Less is needed with: {advice}" if advice else "No smaller setting would fit.")
    )


@contextmanager
def memory_explained(config: InferenceConfig, device: torch.device, batch: int = 1, ranks: int = 1) -> Iterator[None]:
    """Within the context, memory that does not suffice becomes an InputError that says what would fit; of `ranks`
    processes that make videos together."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise out_of_memory(config, device, batch, ranks) from error
        raise
