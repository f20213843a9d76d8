"""How passes are run: as they are, compiled, or compiled and recorded; and getting ready for it when a model is loaded.

eager     PyTorch's operators, one by one
compiled  what lies between the attentions goes through torch.compile
graphed   compiled, and whole passes are recorded as CUDA graphs
auto      graphed on an NVIDIA GPU, eager elsewhere, where compiling a short run takes longer than it saves
"""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from dummy.policy import ContextPolicy
from dummy.retentions import RetentionTable
from pipeline.runtime.generator import BlockGenerator
from pipeline.runtime.inputs import Passes, Segment
from utils.errors import InputError
from utils.files import ensure_writable_folder
from utils.seed import ZeroNoise
from wan.attention.head_group import Retention
from wan.cuda_graphs import CudaRecorder
from wan.geometry import LatentGeometry
from wan.transformer.graphs import GraphedPasses
from wan.transformer.model import CausalWanModel

logger = logging.getLogger(__name__)

EngineName = Literal["auto", "eager", "compiled", "graphed"]

# Whether layers are compiled, and passes recorded; the last is there to tell the effects of both apart.
WAYS = {"eager": (False, False), "compiled": (True, False), "graphed": (True, True), "recorded": (False, True)}
WARMUP_BLOCKS = 8  # with full history; a video of 21 frames has 7. A bounded cache stops growing earlier


def check_engine(name: EngineName, device: torch.device) -> None:
    """Raises InputError if the device cannot have the engine."""
    if name == "graphed" and device.type != "cuda":
        raise InputError(f"engine: 'graphed' needs an NVIDIA GPU, this is {device.type}; use 'auto' or 'compiled'")


def choose_engine(name: EngineName, device: torch.device) -> EngineName:
    """The engine called `name`, "auto" being the fastest that can be expected to run. Raises as `check_engine`."""
    check_engine(name, device)
    if name != "auto":
        return name
    if device.type != "cuda":
        return "eager"
    if importlib.util.find_spec("triton") is None:
        logger.warning("engine: eager, since the package triton, which compiling needs, is not installed")
        return "eager"
    return "graphed"


def use_compile_cache(folder: Path | None) -> None:
    """Keep what torch.compile makes in `folder`, from which later processes take it. Raises InputError."""
    if folder is None:
        return
    ensure_writable_folder(folder, "compile_cache")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder.absolute())  # Triton's cache goes there too


def passes_of(model: CausalWanModel, engine: str, required: bool = True) -> Passes:
    """What runs the model's passes with an engine of `WAYS`.

    `required`: what cannot be recorded is an error and not a warning.
    """
    compiled, recorded = WAYS[engine]
    model.compile_layers(compiled)
    return GraphedPasses(model, CudaRecorder(model.device), required=required) if recorded else model


def start_engine(generator: BlockGenerator, name: EngineName, geometry: LatentGeometry, batch: int = 1) -> bool:
    """Compile and record for `batch` videos of this geometry at a time before the first is made; False if passes run as
    they are, for which nothing has to be made ready.

    An engine that "auto" has chosen and that does not run here gives way to eager, with a warning that says why. Raises
    InputError if the engine was asked for by name.
    """
    engine = choose_engine(name, generator.model.device)
    if engine == "graphed" and generator.model.exchange is not None:
        logger.info("engine: compiled, since passes of several processes are not captured")
        engine = "compiled"
    return engine != "eager" and prepare(generator, engine, geometry, batch, required=name != "auto")


def prepare(
    generator: BlockGenerator, engine: EngineName, geometry: LatentGeometry, batch: int, required: bool
) -> bool:
    """`start_engine` for an engine that is not eager; `required`: it was asked for by name."""
    logger.info("engine: getting %s ready, which takes a minute or two where nothing is cached", engine)
    begin = time.perf_counter()

    def go_back() -> None:
        generator.model.compile_layers(False)
        generator.passes = generator.model
        generator.drop_spare_cache()

    def make_ready() -> None:
        generator.passes = passes_of(generator.model, engine, required)
        warmup(generator, geometry, batch)
        torch.cuda.empty_cache()  # what passes took that from now on are replayed, in memory of their own
        logger.info("engine: %s is ready after %.1f s", engine, time.perf_counter() - begin)

    return or_eager("engine", engine, required, make_ready, go_back)


def or_eager(
    part: str, engine: str, required: bool, make_ready: Callable[[], None], go_back: Callable[[], None]
) -> bool:
    """Make an engine ready. If it does not run here, `go_back` is called, with a warning that says why, or, if the
    engine is `required`, InputError is raised. Whether it runs."""
    try:
        make_ready()
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    # Compilers, drivers and the tools that they start have errors of every kind, of which few are RuntimeErrors.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines()]
        reason = next(filter(None, lines), type(error).__name__)
        if required:
            raise InputError(f"{part}: {engine!r} does not run here ({reason}); use engine=eager") from error
        logger.warning("%s: eager, since %s does not run here (%s)", part, engine, reason)
        go_back()
        return False
    return True


def warmup(generator: BlockGenerator, geometry: LatentGeometry, batch: int = 1) -> None:
    """Make the beginning of a video that nobody sees, until what passes are made of repeats itself.

    What zeros tell of heads is of no use, and nothing is captured before heads have parted; but parts of a layer are
    compiled once more for heads in an order of their own, which is done here with a table of what they might keep.
    """
    policy = generator.settings.policy
    if policy.observed is not None and policy.fixed_layout() is None:
        config = generator.model.config
        table = RetentionTable.of([[Retention(0, 1)] * config.num_heads] * config.num_layers)
        policy = ContextPolicy(policy.name, table.largest(), table=table)
        ordered = BlockGenerator(generator.model, replace(generator.settings, policy=policy))
        for one in (ordered, generator):
            _begin(one, geometry, batch, blocks=1)
    else:
        _begin(generator, geometry, batch, blocks=WARMUP_BLOCKS)


def _begin(generator: BlockGenerator, geometry: LatentGeometry, batch: int, blocks: int) -> None:
    """Make at most so many blocks, and the clean pass of each, until the cache is in a state that it was in before."""
    config = generator.model.config
    with torch.inference_mode():
        text = generator.model.encode_text(torch.zeros(batch, config.text_len, config.text_dim))
    rollout = generator.start(geometry, [Segment(0, text)], ZeroNoise(batch), batch)
    seen = set()
    with closing(rollout.blocks()) as made:
        for block in made:
            # Processes that make a video together must take equally many, and each has a state of its own.
            repeats = rollout.cache.state in seen and generator.model.exchange is None
            if repeats or block.index == blocks:
                break
            seen.add(rollout.cache.state)
