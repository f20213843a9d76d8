"""Tensors between the host and a device, and between the streams of devices, without waiting for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

QUEUES = ("cuda",)  # types of devices that work on streams while the host goes on


def has_streams(device: torch.device) -> bool:
    """Whether the device works off streams of its own, on which the host queues work and goes on."""
    return device.type in QUEUES


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`; returns at once, the copy is queued behind what the device has to do.

    CUDA copies from pinned memory alone without holding up the host.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def host_memory(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An empty tensor of the host to which a device copies while the host goes on (page-locked)."""
    return torch.empty(*shape, dtype=dtype, device="cpu", pin_memory=True)


class SideStream:
    """A stream of a device beside its current one.

    What comes from another device is copied on a further stream, of that device: PyTorch copies between two devices on
    the current stream of the one that has the tensor, after it has made this stream wait for the other's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call,unused-ignore]
        self._outgoing: dict[torch.device, torch.cuda.Stream] = {}

    @contextmanager
    def after(self, tensor: Tensor) -> Iterator[None]:
        """Within the context work is queued here, behind what made the tensor, which is used here, and behind what the
        current stream of this device has to do: there weights were put in place."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        source = self._stream
        if tensor.device != self._device and has_streams(tensor.device):
            source = self._from(tensor.device)
            source.wait_stream(torch.cuda.current_stream(tensor.device))
        if has_streams(tensor.device):
            tensor.record_stream(source)  # its memory is not to be used again before this stream is done
        with torch.cuda.stream(source), torch.cuda.stream(self._stream):
            yield

    def _from(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._outgoing:
            stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call,unused-ignore]
            self._outgoing[device] = stream
        return self._outgoing[device]
