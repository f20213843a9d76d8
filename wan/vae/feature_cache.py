"""What the layers of Wan's VAE remember of the frames before, so that a video can come in pieces.

Tensors are allocated once, so that a video of any length keeps to the same addresses, on the device or, for less memory
there, on the host. This file does not know the layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from utils.pinned_buffers import PinnedBuffers
from wan.vae.norm import RMSNorm


class FeatureCache:
    """The frames before, for some layers in the order in which they run: zeros until a piece has gone through.

    `first` says that none has. `begin` must be called before every piece, `end` after it.

    With memory of a `host` what is kept lies there: a layer's window is filled from there and leaves its last frames
    there, so that the device holds one layer's window at a time and no more. The copies are queued on the current
    stream, and nobody waits for them.
    """

    def __init__(self, host: PinnedBuffers | None = None) -> None:
        self.first = True
        self._host = host
        self._kept: list[Tensor] = []
        self._copying: torch.device | None = None  # the device, if what is kept lies in the memory of another
        self._frames: dict[int, list[Tensor]] = {}
        self._next = 0

    def begin(self) -> None:
        self._next = 0

    def end(self) -> None:
        assert self.first or self._next == len(self._kept), "other layers than those of the last piece"
        self.first = False

    def clear(self) -> None:
        """Be as new, in the same memory."""
        if self._copying is not None:
            torch.cuda.synchronize(self._copying)  # an interrupted video may have left copies under way
        for kept in self._kept:
            kept.zero_()
        self.first = True

    def nbytes(self) -> int:
        return sum(kept.nbytes for kept in self._kept)

    def window(self, x: Tensor, frames: int, norm: RMSNorm | None = None) -> Tensor:
        """The last `frames` frames of the layer's earlier input, then x [B, C, T, H, W] (normalised and activated, if
        there is a norm): [B, C, frames + T, H, W]. Its last frames are kept for the next piece.
        """
        kept = self._slot(x, frames)
        if torch.compiler.is_compiling():  # the compiler joins norm and activation, and writes them where they go
            new = x if norm is None else norm.activated(x)
            window = torch.cat([kept, new], dim=2)
            kept.copy_(window[:, :, -frames:])
            return window
        window = empty(x, frames + x.shape[2])
        _transfer(kept, window[:, :, :frames])
        put(x, window[:, :, frames:], norm)
        _transfer(window[:, :, -frames:], kept)
        return window

    def frames(self, x: Tensor, count: int) -> list[Tensor]:
        """`count` frames like those of x, [B, C, H, W], the oldest first, zeros to begin with: for a layer that writes
        new ones over the oldest, and puts the list in order."""
        kept = self._slot(x, count)
        if self._next not in self._frames:
            self._frames[self._next] = list(kept.unbind(2))
        return self._frames[self._next]

    def with_before(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W] with the channels of the frame before each frame behind its own: [B, 2·C, T, H, W]."""
        kept, new = self._slot(x, 1), x
        before = empty(x, x.shape[2])
        _transfer(kept, before[:, :, :1])
        before[:, :, 1:] = new[:, :, :-1]
        _transfer(new[:, :, -1:], kept)
        return torch.cat([_in_order(new), _in_order(before)], dim=-1).permute(0, 4, 1, 2, 3)

    def pass_over(self, x: Tensor, frames: int) -> None:
        """Instead of `window`, for a layer that does not see this piece: what is kept stays."""
        self._slot(x, frames)

    def _slot(self, x: Tensor, frames: int) -> Tensor:
        if self._next == len(self._kept):
            self._kept.append(self._zeros(x, frames))
        self._next += 1
        return self._kept[self._next - 1]

    @torch.inference_mode(False)  # so that it can be written in any mode, whichever it was made in
    def _zeros(self, x: Tensor, frames: int) -> Tensor:
        if self._host is None or x.device.type == "meta":  # there, to find out what it takes, all places are one
            return empty(x, frames).zero_()
        if x.device.type == "cuda":
            self._copying = x.device
        batch, channels, _, height, width = x.shape
        return self._host.zeros((batch, frames, height, width, channels), x.dtype).permute(0, 4, 1, 2, 3)


def _in_order(x: Tensor) -> Tensor:
    """[B, C, T, H, W] as it lies in memory, [B, T, H, W, C]."""
    return x.permute(0, 2, 3, 4, 1)


def _transfer(source: Tensor, to: Tensor) -> None:
    """Copy; between devices in one piece."""
    _in_order(to).copy_(_in_order(source), non_blocking=True)


def put(x: Tensor, to: Tensor, norm: RMSNorm | None) -> None:
    """Write x there, normalised and activated if there is a norm."""
    if norm is None:
        to.copy_(x)
    else:
        norm.activated_into(x, to)


def empty(like: Tensor, frames: int) -> Tensor:
    """[B, C, frames, H, W] with channels last."""
    batch, channels, _, height, width = like.shape
    return like.new_empty(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3)
