"""Work on a device that is captured once and replayed (CUDA graphs): how a device does that, not what is captured."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

import torch

Replay = Callable[[], None]


class Recorder(Protocol):
    """How a device records. Functions given to it work in place on tensors that outlive the recording."""

    def warm_up(self, function: Callable[[], None]) -> None:
        """Run the function once, where it will be recorded."""

    def record(self, function: Callable[[], None]) -> Replay:
        """What repeats the function's work on the device. Raises RuntimeError if it cannot be recorded."""


class CudaRecorder:
    """CUDA graphs, recorded on a stream of their own in one memory pool that they share: they never run at once, and
    leave nothing behind in it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call,unused-ignore]
        self._pool = torch.cuda.graph_pool_handle()
        self._anchor = self._hold_pool()

    def _hold_pool(self) -> Replay:
        """A pool must not be used again after its last graph is gone, so there is one that stays."""
        one = torch.ones(1, device=self._device)
        self.warm_up(one.clone)
        return self.record(one.clone)

    def warm_up(self, function: Callable[[], object]) -> None:
        with self._on_side_stream():
            function()

    def record(self, function: Callable[[], object]) -> Replay:
        try:
            return self._capture(function)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()  # what the allocator keeps for later cannot be had back in a recording
            return self._capture(function)

    def _capture(self, function: Callable[[], object]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        with self._on_side_stream(), _no_collection():
            # The mode lets other threads (a decoder, a writer) allocate meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                function()
            except BaseException:
                with suppress(RuntimeError):  # an error that follows from the first, which is the one to tell
                    self._end(graph)
                raise
            self._end(graph)
        return graph.replay

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        """Where the driver ends a capture with an error, some releases of PyTorch leave the allocator's part of it
        open: it would refuse to empty its cache from then on."""
        try:
            graph.capture_end()
        except BaseException:
            with suppress(RuntimeError):  # it is closed
                torch._C._cuda_endAllocateToPool(self._device.index or 0, self._pool)
                torch._C._cuda_releasePool(self._device.index or 0, self._pool)
            raise

    @contextmanager
    def _on_side_stream(self) -> Iterator[None]:
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            here.wait_stream(self._stream)  # after an error too: what was done there may still be under way


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage may hold graphs and events, which must not be freed during a recording."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
