"""Three-dimensional rotary position embedding of Wan 2.1 (arXiv 2503.20314; RoPE: 2104.09864).

Of the D/2 rotation pairs of a head the first D/2 - 2 * (D // 6) turn with the latent-frame index, the next D // 6 with
the row and the rest with the column; pairs are neighbouring channels. Angles are computed in float64 on the host from
the position itself, so any frame index works; what reaches the device are the float32 cosines and sines of each axis,
a few kilobytes, which are spread over the grid there, once a block.
The file knows positions only, neither caches nor policies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from utils.transfer import to_device

BASE = 10000.0
_MOST_SHIFTS = 64  # remembered at once; a block needs as many as a group has sinks, or fewer


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines for consecutive tokens, each [L, 1, D/2] float32 (or [1, 1, D/2] for one common turn)."""

    cos: Tensor
    sin: Tensor


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the channel pairs (2i, 2i+1) of x [B, L, H, D]; float32 inside, the dtype of x outside.

    Each channel takes the other one of its pair by its place. Even and odd channels turned apart and interleaved again
    would be the same numbers, but compiled they go through memory in float32.
    """
    pairs = x.float().view(*x.shape[:-1], -1, 2)
    across = torch.stack((-rotation.sin, rotation.sin), dim=-1)
    return (pairs * rotation.cos.unsqueeze(-1) + pairs.flip(-1) * across).type_as(x).flatten(-2)


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
            self._key, self._table = key, self._spread(start_frame, frames, grid, device)
        return self._table

    def _spread(self, start_frame: int, frames: int, grid: tuple[int, int], device: torch.device) -> Rotation:
        rows, columns = grid
        axes = (
            torch.outer(_positions(start_frame, frames), self._frame)[:, None, None],
            torch.outer(_positions(0, rows), self._row)[None, :, None],
            torch.outer(_positions(0, columns), self._column)[None, None, :],
        )
        parts = [_turns(angles, device).expand(2, frames, rows, columns, -1) for angles in axes]
        cos, sin = torch.cat(parts, dim=-1).flatten(1, 3).unsqueeze(2)
        return Rotation(cos, sin)

    def frame_shift(self, frames: int, device: torch.device) -> Rotation:
        """The turn [1, 1, D/2] that moves rotated keys by `frames` positions along the frame axis."""
        still = torch.zeros(len(self._row) + len(self._column), dtype=torch.float64, device="cpu")
        cos, sin = _turns(torch.cat((frames * self._frame, still))[None, None], device)
        return Rotation(cos, sin)


class FrameShifts:
    """Turns that move rotated keys along the frame axis, on one device; those in use are remembered."""

    def __init__(self, head_dim: int, device: torch.device) -> None:
        self._rotary = RotaryEmbedding(head_dim)
        self._device = device
        self._known: dict[int, Rotation] = {}

    def __call__(self, frames: int) -> Rotation:
        """The turn [1, 1, D/2] by so many frames, which may be negative."""
        if frames not in self._known:
            if len(self._known) >= _MOST_SHIFTS:
                self._known.clear()
            self._known[frames] = self._rotary.frame_shift(frames, self._device)
        return self._known[frames]


def _turns(angles: Tensor, device: torch.device) -> Tensor:
    """Cosines and sines [2, ...] of float64 angles on the host, float32 on the device."""
    return to_device(torch.stack((angles.cos(), angles.sin())).float(), device)
