"""Processes that make one video together: `parallel: heads` under torchrun (wan/attention/exchange.py says how).

The first process decides what is made and writes it; the others follow with their heads. Noise, latents and decisions
are the same on all of them; prompts are encoded by the first alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from pipeline.config.config import InferenceConfig, as_dict
from pipeline.runtime.loading import choose_device
from utils.distributed import World
from utils.errors import InputError
from wan.attention.exchange import HeadExchange

# Of a collective, since a session waits for its user; that a process is lost is noticed at once.
_PATIENCE = timedelta(days=7)
_GONE = ("closed", "reset", "gloo", "nccl", "timed out", "peer")  # words of errors about a lost process


def require_world(config: InferenceConfig, world: World) -> None:
    """Raises InputError for several processes that nothing tells to work together, or for another number of them than
    `parallel` names."""
    if world.size > 1 and config.parallel is None:
        raise InputError(
            f"parallel: torchrun has started {world.size} processes, each of which would make the same videos; set "
            "parallel=heads, by which they make one video together, or start one process"
        )
    if config.ranks not in (None, world.size):
        raise InputError(
            f"parallel: {config.parallel} is for {config.ranks} processes, and there "
            f"{'is' if world.size == 1 else 'are'} {world.size}; use torchrun --nproc_per_node={config.ranks}, or "
            "parallel=heads"
        )


def require_equal(config: InferenceConfig, first: object, world: World) -> None:
    """Raises InputError if this process has other settings than the first; `first` as `as_dict` gives them."""
    own = as_dict(config)
    others = [key for key, value in own.items() if not isinstance(first, dict) or first.get(key) != value]
    if others:
        raise InputError(
            f"{', '.join(others)}: process {world.rank} has other values than process 0; give all processes the same "
            "configuration"
        )


def rank_device(config: InferenceConfig, world: World) -> torch.device:
    """This process's device: a GPU for each process of the machine. Raises InputError if there are too few."""
    device = choose_device(config)
    if device.type != "cuda":
        return device
    if config.device not in ("auto", "cuda"):
        if world.local_size > 1:
            raise InputError(
                f"device: {config.device} is one GPU for {world.local_size} processes; use device=cuda, which gives "
                "each process its own"
            )
        return device
    count = torch.cuda.device_count()
    if world.local_size > count:
        raise InputError(
            f"--nproc_per_node: {world.local_size} processes for {count} CUDA devices; use --nproc_per_node={count}"
        )
    return torch.device("cuda", world.local_rank)


@contextmanager
def joined(world: World, device: torch.device, ranks: int | None = None) -> Iterator[HeadExchange | None]:
    """Within the context this process is one of `ranks` neighbouring ones (all, by default) that make a video; None if
    it is alone.

    Raises InputError if another one is lost.
    """
    ranks = world.size if ranks is None else ranks
    if ranks == 1:
        yield None
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=_PATIENCE)
    try:
        teams = [dist.new_group(range(first, first + ranks)) for first in range(0, world.size, ranks)]
        yield HeadExchange(world.rank % ranks, ranks, teams[world.rank // ranks])
    except (RuntimeError, dist.DistError) as error:
        reason = str(error).splitlines()[0]
        if not any(word in reason.lower() for word in _GONE):
            raise
        raise InputError(
            f"parallel: process {world.rank} has lost another one ({reason}), so that the video at work cannot be "
            "finished. What that one has said, if anything, tells why; finished videos are kept, and a new start makes "
            "the rest."
        ) from error
    finally:
        dist.destroy_process_group()
