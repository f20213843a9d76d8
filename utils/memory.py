"""Predicting how much memory a computation needs, without doing it.

`PeakTracker` watches the tensors that PyTorch operators return and adds up their storages while they live. Run a model
under it on the meta device, and the peak of its activations is known before anything is loaded. This file knows neither
the model nor the caching and rounding of the CUDA allocator, and does not see what a fused kernel allocates inside.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from utils.meta_results import result_of, tensors_in

_MIB = 1024**2
_GIB = 1024**3


def format_bytes(n: int) -> str:
    """`n` bytes for people: GiB with two decimals from 1 GiB on, MiB with one below."""
    return f"{n / _GIB:.2f} GiB" if abs(n) >= _GIB else f"{n / _MIB:.1f} MiB"


def memory_of(device: torch.device) -> int:
    """Bytes of memory that this process may have: on a CUDA device what is free and what its allocator has already, so
    without the libraries' part and other programs' (on Windows and in containers too); on the CPU all, or its limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    try:
        import resource  # not on Windows
    except ImportError:
        return pages
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return pages if limit == resource.RLIM_INFINITY else min(pages, limit)


def _storages(values: object) -> list[torch.UntypedStorage]:
    """The storages of all dense tensors in a nest of lists, tuples and dicts; anything else in it is skipped."""
    return [tensor.untyped_storage() for tensor in tensors_in(values) if tensor.layout is torch.strided]


class PeakTracker(TorchDispatchMode):  # type: ignore[no-untyped-call,unused-ignore]
    """Counts the bytes of the tensors that are created while it is active, on any device, meta included.

    A storage counts once, however many views look at it, from the operator that first returns it until the last tensor
    on it is gone. Tensors that exist already (weights, inputs, caches) never count, nor do views of them or in-place
    results. Counting goes by the storages' own sizes, so a tensor that is expanded costs what it occupies.

        with PeakTracker() as memory:
            model(latents)
        memory.peak  # bytes
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call,unused-ignore]
        self.current = 0  # bytes alive now
        self.peak = 0  # most bytes alive at once so far
        # By the address of the storage: an entry goes when its storage dies, before the address can be used again.
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._counted: dict[int, int] = {}  # of those that did not come from outside

    def reset_peak(self) -> None:
        """Start a new peak from what is alive now."""
        self.peak = self.current

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        given = _storages((args, kwargs))
        # torch.tensor(data) makes its tensor out of sight and shows it first as the argument of lift_fresh.
        if func is not torch.ops.aten.lift_fresh.default:
            for storage in given:
                self._note_outside(storage)
        result = result_of(func, args, kwargs)
        # What it was given, too: an operator may enlarge that (resize_, out=).
        for storage in (*_storages(result), *given):
            self._count(storage)
        self.peak = max(self.peak, self.current)
        return result

    def _note_outside(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known:
            self._watch(storage)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._watch(storage)
            self._counted[key] = 0
        if key in self._counted:
            self.current += size - self._counted[key]
            self._counted[key] = size

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata

        def gone(_: object) -> None:
            del self._known[key]
            self.current -= self._counted.pop(key, 0)

        self._known[key] = weakref.ref(storage, gone)
