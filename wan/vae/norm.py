"""The norm of Wan's VAE, over the channels of every pixel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TINY = 1e-12  # keeps a pixel of nothing but zeros from being divided by 0


class RMSNorm(nn.Module):
    """Divides by the root of the mean square over the channels, dimension 1."""

    def __init__(self, channels: int, dimensions: int) -> None:
        """`dimensions` that follow the channels: 3 for video, 2 for images."""
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * dimensions))
        self._root = channels**0.5

    def forward(self, x: Tensor) -> Tensor:
        normalised: Tensor = x / _length(x) * self._root * self.gamma
        return normalised.to(x.dtype)

    def activated(self, x: Tensor) -> Tensor:
        """silu(norm(x)), rounded once."""
        return F.silu(x / _length(x) * self._root * self.gamma).to(x.dtype)

    def activated_into(self, x: Tensor, out: Tensor) -> None:
        """`activated` without further memory. Scaled in two steps: so the sums have Diffusers' bits in float32."""
        torch.div(x, _length(x), out=out)
        out.mul_(self._root).mul_(self.gamma)
        F.silu(out, inplace=True)


def _length(x: Tensor) -> Tensor:
    """The Euclidean length of every pixel's channels, [B, 1, ...]."""
    length: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return length.clamp_min_(TINY)
