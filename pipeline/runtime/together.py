"""Processes that make one video together: `parallel: heads` under torchrun (wan/attention/exchange.py says how).

The first process decides what is made and writes it; the others follow with their heads. Noise, latents and decisions
are the same on all of them; prompts are encoded by the first alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from pipeline.config.config import InferenceConfig, as_dict
from pipeline.runtime.company import Company, Leaving, LostProcess
from pipeline.runtime.loading import choose_device
from utils.command import end_at_once
from utils.distributed import TELL_S, World
from utils.errors import InputError, ToldElsewhere
from wan.attention.exchange import HeadExchange

_PATIENCE = timedelta(days=7)  # of a collective; that a process is lost is noticed at once (company)
_WITHOUT_END = timedelta(days=3650)  # a session waits for its user, and the others for the session
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
def checked_by_all(exchange: HeadExchange | None) -> Iterator[None]:
    """Within the context processes see to what each of them has; if one raises InputError, all do, and one tells."""
    refusal: InputError | None = None
    try:
        yield
    except InputError as error:
        if exchange is None:
            raise
        refusal = error
    if exchange is None:
        return
    said = exchange.from_all(None if refusal is None else str(refusal))
    wrong = [(rank, text) for rank, text in enumerate(said) if text is not None]
    if wrong and exchange.rank:
        time.sleep(TELL_S)
        raise ToldElsewhere(wrong[0][1]) from refusal
    if wrong:
        rank, text = wrong[0]
        raise refusal or InputError(f"process {rank}: {text}")


@contextmanager
def joined(world: World, device: torch.device, ranks: int | None = None) -> Iterator[HeadExchange | None]:
    """Within the context this process is one of `ranks` neighbouring ones (all, by default) that make a video; None if
    it is alone.

    Raises InputError if another one is lost, ToldElsewhere if another one has told of it.
    """
    ranks = world.size if ranks is None else ranks
    if ranks == 1:
        yield None
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    end_at_once()
    company, how = None, Leaving.TOLD
    try:
        dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=_PATIENCE)
        team, waiting, listening = (_team(world, ranks, own) for own in (None, "gloo", "gloo"))
        exchange = HeadExchange(world.rank % ranks, ranks, team, waiting)
        company = Company(exchange, listening, world.rank - exchange.rank)
        yield exchange
        how = Leaving.DONE
    # A launcher that sees a process die interrupts the others.
    except (RuntimeError, dist.DistError, KeyboardInterrupt) as error:
        refusal = _refusal(error, company)
        if refusal is None:
            raise
        how = Leaving.BEREFT
        raise refusal from error
    finally:
        if company is not None:
            company.leave(how)
        if how is Leaving.DONE:  # else work may be under way that waits for a process which is gone
            dist.destroy_process_group()


def _team(world: World, ranks: int, backend: str | None) -> dist.ProcessGroup:
    """The process group of this process's team; every process knows those of all."""
    patience = _PATIENCE if backend is None else _WITHOUT_END
    teams: list[dist.ProcessGroup] = [
        dist.new_group(range(first, first + ranks), timeout=patience, backend=backend)
        for first in range(0, world.size, ranks)
    ]
    return teams[world.rank // ranks]


def _refusal(error: BaseException, company: Company | None) -> InputError | None:
    """What to say of an error if it comes of a process that is lost."""
    loss = error if isinstance(error, LostProcess) else None if company is None else company.loss()
    if loss is not None:
        return InputError(str(loss)) if loss.tells else ToldElsewhere(str(loss))
    if isinstance(error, KeyboardInterrupt):
        return None
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, dist.DistError) or any(word in reason.lower() for word in _GONE):
        return InputError(f"parallel: the processes that are to make videos together lost each other ({reason})")
    return None
