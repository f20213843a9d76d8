"""Three-dimensional rotary position embedding of Wan 2.1 (arXiv 2503.20314; RoPE: 2104.09864).

Of the D/2 rotation pairs of a head the first D/2 - 2 * (D // 6) turn with the latent-frame index, the next D // 6 with
the row and the rest with the column; pairs are neighbouring channels. Angles are computed in float64 on the host from
the position itself, so any frame index works; what reaches the device are small float32 tables, once a block.
The file knows positions only, neither caches nor policies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BASE = 10000.0


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines for consecutive tokens, each [L, 1, D/2] float32 (or [1, 1, D/2] for one common turn)."""

    cos: Tensor
    sin: Tensor


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the channel pairs (2i, 2i+1) of x [B, L, H, D]; float32 inside, the dtype of x outside."""
    even, odd = x.float().reshape(*x.shape[:-1], x.shape[-1] // 2, 2).unbind(-1)
    cos, sin = rotation.cos, rotation.sin
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


def _frequencies(pairs: int) -> Tensor:
    """The ladder BASE^(-2i/d) of one axis with d = 2 * pairs, float64."""
    return BASE ** -(_positions(0, pairs) / max(pairs, 1))


def _positions(first: int, count: int) -> Tensor:
    # On the CPU also where the default device is another one: models are built on the meta device.
    return torch.arange(first, first + count, dtype=torch.float64, device="cpu")


class RotaryEmbedding:
    """Rotations for tokens on a frames x rows x columns grid, heads of width `head_dim`.

    The last table is remembered: the steps of a block all use the same one.
    """

    def __init__(self, head_dim: int) -> None:
        axis = head_dim // 6
        self._frame, self._row, self._column = (_frequencies(n) for n in (head_dim // 2 - 2 * axis, axis, axis))
        self._key: tuple[int, int, tuple[int, int], torch.device] | None = None
        self._table: Rotation | None = None

    def table(self, start_frame: int, frames: int, grid: tuple[int, int], device: torch.device) -> Rotation:
        """Rotation [frames * rows * columns, 1, D/2] for the frames from `start_frame` on, absolute positions."""
        key = (start_frame, frames, grid, device)
        if self._table is None or key != self._key:
            rows, columns = grid
            time = torch.outer(_positions(start_frame, frames), self._frame)
            row = torch.outer(_positions(0, rows), self._row)
            column = torch.outer(_positions(0, columns), self._column)
            shape = (frames, rows, columns, -1)
            angles = (
                time[:, None, None].expand(shape),
                row[None, :, None].expand(shape),
                column[None, None, :].expand(shape),
            )
            flat = torch.cat(angles, dim=-1).flatten(0, 2).unsqueeze(1)
            self._key, self._table = key, _rotation(flat, device)
        return self._table

    def frame_shift(self, frames: int, device: torch.device) -> Rotation:
        """The turn [1, 1, D/2] that moves rotated keys by `frames` positions along the frame axis."""
        still = torch.zeros(len(self._row) + len(self._column), dtype=torch.float64, device="cpu")
        return _rotation(torch.cat((frames * self._frame, still))[None, None], device)


def _rotation(angles: Tensor, device: torch.device) -> Rotation:
    cos, sin = (f(angles).float().to(device, non_blocking=True) for f in (torch.cos, torch.sin))
    return Rotation(cos, sin)
