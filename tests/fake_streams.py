"""CUDA streams without a GPU, for tests: every stream carries a vector clock, and a mode watches what runs on which.

Of two devices with streams one is the CPU, whose tensors are real, the other is `meta`. What one stream writes and
another reads or writes must be ordered by a wait; and memory, which belongs to the stream on which it was made, must
not be freed while another stream may be at work on it, since the allocator gives it out again at once.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.runtime import decoding
from utils import transfer

_numbers = itertools.count(1)


class FakeStream:
    """As torch.cuda.Stream; `clock` says how much of every stream's work is done when this one goes on."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.cuda_stream = next(_numbers)
        self.clock: dict[FakeStream, int] = {self: 0}

    def work(self) -> int:
        self.clock[self] += 1
        return self.clock[self]

    def wait_stream(self, other: FakeStream) -> None:
        for stream, time in other.clock.items():
            self.clock[stream] = max(self.clock.get(stream, 0), time)

    def waits_for(self, stream: FakeStream, time: int) -> bool:
        return self.clock.get(stream, 0) >= time


class FakeEvent:
    """As torch.cuda.Event; the host's waiting is of no interest here."""

    def __init__(self, **_: bool) -> None: ...

    def record(self, stream: FakeStream) -> None: ...

    def synchronize(self) -> None: ...


@dataclass
class Memory:
    """A storage: the stream on which it was made, where and when it was written last, and used by each stream."""

    owner: FakeStream
    written: tuple[FakeStream, int] | None = None
    used: dict[FakeStream, int] = field(default_factory=dict)
    recorded: set[FakeStream] = field(default_factory=set)


class OrderedStreams(TorchDispatchMode):
    """Within the mode `errors` collects what is not ordered."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []
        self._current: dict[str, FakeStream] = {}
        self._memory: dict[int, Memory] = {}
        self._host: set[int] = set()

    def current(self, device: torch.device | str) -> FakeStream:
        device = torch.device(device)
        if device.type not in self._current:
            self._current[device.type] = FakeStream(device)
        return self._current[device.type]

    @contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        before, self._current[stream.device.type] = self.current(stream.device), stream
        try:
            yield
        finally:
            self._current[stream.device.type] = before

    def record(self, tensor: Tensor, stream: FakeStream) -> None:
        """As Tensor.record_stream."""
        self._of(tensor, self.current(tensor.device)).recorded.add(stream)

    def host_memory(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        memory = torch.empty(*shape, dtype=dtype)
        self._host.add(memory.untyped_storage()._cdata)
        return memory

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = func.overloadpacket.__name__
        if name == "copy_" and given[1].device.type == "meta" != given[0].device.type:
            result = given[0]  # there are no values to be had
        else:
            result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if name in ("to", "_to_copy", "copy_") and self._from_device_to_device(given, made):
            return result
        arguments = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **(kwargs or {})}
        changed = [arguments.get(a.name) for a in func._schema.arguments if a.is_write]
        written = {leaf.untyped_storage()._cdata for leaf in tree_leaves(changed) if isinstance(leaf, Tensor)}
        old = {tensor.untyped_storage()._cdata for tensor in given}
        for tensor in given:
            self._use(name, tensor, self.current(tensor.device), tensor.untyped_storage()._cdata in written)
        for tensor in made:
            if tensor.untyped_storage()._cdata not in old:
                self._use(name, tensor, self.current(tensor.device), True)
        return result

    def _from_device_to_device(self, given: Sequence[Tensor], made: Sequence[Tensor]) -> bool:
        """PyTorch copies on the current stream of the source, which waits for that of the target before, and the other
        way round afterwards."""
        source, target = given[-1], made[0]
        if source.device.type == target.device.type or target.untyped_storage()._cdata in self._host:
            return False
        here, there = self.current(source.device), self.current(target.device)
        here.wait_stream(there)
        self._of(target, there)
        self._use("copy", source, here, False)
        self._use("copy", target, here, True)
        there.wait_stream(here)
        return True

    def _of(self, tensor: Tensor, stream: FakeStream) -> Memory:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._memory:
            self._memory[key] = Memory(stream)
            weakref.finalize(storage, self._freed, key, tuple(tensor.shape)).atexit = False
        return self._memory[key]

    def _use(self, name: str, tensor: Tensor, stream: FakeStream, write: bool) -> None:
        if tensor.untyped_storage()._cdata in self._host:
            return
        memory = self._of(tensor, stream)
        before = dict([memory.written]) if memory.written is not None else {}
        if write:
            before |= memory.used
        for other, time in before.items():
            if not stream.waits_for(other, time):
                self.errors.append(f"{name} of {tuple(tensor.shape)} does not wait for another stream's work on it")
        time = stream.work()
        memory.used[stream] = time
        if write:
            memory.written = stream, time

    def _freed(self, key: int, shape: tuple[int, ...]) -> None:
        memory = self._memory.pop(key)
        for stream, time in memory.used.items():
            if stream not in memory.recorded and not memory.owner.waits_for(stream, time):
                self.errors.append(f"{shape} is freed while another stream may be at work on it")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> OrderedStreams:
    """The CPU and `meta` are devices with streams from now on."""
    made = OrderedStreams()
    monkeypatch.setattr(transfer, "QUEUES", ("cpu", "meta"))
    monkeypatch.setattr(decoding, "host_memory", made.host_memory)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: made.record(tensor, stream))
    for name, fake in {
        "Stream": FakeStream,
        "Event": FakeEvent,
        "current_stream": made.current,
        "stream": made.on,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return made
