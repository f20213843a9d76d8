"""Memory of the host that a GPU copies from and to without stopping: page-locked, and no more of it than is used.

PyTorch rounds every page-locked tensor up to a power of two, up to twice its size; so tensors share pieces of memory
that are one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

PIECE = 2**28  # bytes
ALIGNED = 512  # bytes, as the allocators do


class PinnedBuffers:
    """Tensors on the host, page-locked if that is asked for; the memory goes when the last of them is gone."""

    def __init__(self, page_locked: bool) -> None:
        self._page_locked = page_locked
        self._free = torch.empty(0, dtype=torch.uint8, device="cpu")

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        taken = -(-size // ALIGNED) * ALIGNED
        if taken > PIECE:
            return self._new(size).view(dtype).view(*shape)
        if taken > self._free.nelement():
            self._free = self._new(PIECE)
        made, self._free = self._free[:size], self._free[taken:]
        return made.view(dtype).view(*shape)

    def _new(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.uint8, device="cpu", pin_memory=self._page_locked)
