"""The linear code that the small VAE is trained towards: principal components of patches of 4 frames x 8 x 8 pixels.

Sixteen whitened components are the latents that the transformer learns; the VAE's encoder learns to compute them, its
decoder to draw from them. So both trainings can start at once, and latents have unit scale by construction.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from shapes.runs import load, save

CHANNELS = 16
TIME, SIDE = 4, 8
RIDGE = 1e-3  # variance that is added to a patch's values in [-1, 1]: few films leave some of them hardly any


@dataclass(frozen=True)
class LinearCode:
    """`mean` [768], `encoder` [16, 768] and `decoder` [768, 16] for patches flattened as (frames, 3, rows, columns)."""

    mean: Tensor
    encoder: Tensor
    decoder: Tensor

    @classmethod
    def fit(cls, patches: Tensor) -> LinearCode:
        """From patches [N, 768]; the components with the largest variance, each scaled to variance 1."""
        mean = patches.double().mean(0)
        centred = patches.double() - mean
        variance, vectors = torch.linalg.eigh(centred.T @ centred / len(patches))
        scale = variance[-CHANNELS:].flip(0).sqrt()
        basis = vectors[:, -CHANNELS:].flip(1)
        # An eigenvector's sign is free: fix it, so that every machine finds the same code.
        basis = basis * torch.where(basis.sum(0) < 0, -1.0, 1.0)
        return cls(mean.float(), (basis / scale).T.float().contiguous(), (basis * scale).float().contiguous())

    @classmethod
    def nearest(cls, patches: Tensor, latents: Tensor) -> LinearCode:
        """The one that comes nearest to whatever has made latents [N, 16] of patches [N, 768], by least squares."""
        x, z = patches.double(), latents.double()
        mean, middle = x.mean(0), z.mean(0)
        x, z = x - mean, z - middle
        spread, both = x.T @ x / len(x), z.T @ x / len(x)
        encoder = torch.linalg.solve(spread + RIDGE * torch.eye(len(mean)), both.T).T
        decoder = torch.linalg.solve(z.T @ z / len(z), both).T
        mean = mean - torch.linalg.pinv(encoder) @ middle
        return cls(mean.float(), encoder.float().contiguous(), decoder.float().contiguous())

    def encode(self, video: Tensor) -> Tensor:
        """Video [B, 1 + 4·k, 3, H, W] in [-1, 1] to latents [B, 1 + k, 16, H / 8, W / 8]."""
        latents = (patches(video) - self.mean) @ self.encoder.T
        return latents.permute(0, 1, 4, 2, 3)

    def encode_later(self, video: Tensor) -> Tensor:
        """Video [B, 4·k, 3, H, W] from the middle of a longer one, on its raster of frames, to latents [B, k, ...]."""
        return self.encode(torch.cat((video[:, :1], video), dim=1))[:, 1:]

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse of `encode` on the span of the components; the first frame is the mean of its four."""
        flat = latents.permute(0, 1, 3, 4, 2) @ self.decoder.T + self.mean
        batch, frames, rows, columns, _ = flat.shape
        video = flat.view(batch, frames, rows, columns, TIME, 3, SIDE, SIDE).permute(0, 1, 4, 5, 2, 6, 3, 7)
        video = video.reshape(batch, frames, TIME, 3, rows * SIDE, columns * SIDE)
        return torch.cat((video[:, 0].mean(1, keepdim=True), video[:, 1:].flatten(1, 2)), dim=1)

    def save(self, path: Path) -> None:
        save({"mean": self.mean, "encoder": self.encoder, "decoder": self.decoder}, path)

    @classmethod
    def load(cls, path: Path) -> LinearCode:
        """Raises InputError for a file that is damaged."""
        return cls(**cast("dict[str, Tensor]", load(path)))


def patches(video: Tensor) -> Tensor:
    """Video [B, 1 + 4·k, 3, H, W] to [B, 1 + k, H / 8, W / 8, 768]; the first frame stands for four equal ones."""
    video = torch.cat((video[:, :1].expand(-1, TIME - 1, -1, -1, -1), video), dim=1)
    batch, frames, channels, height, width = video.shape
    split = video.view(batch, frames // TIME, TIME, channels, height // SIDE, SIDE, width // SIDE, SIDE)
    return split.permute(0, 1, 4, 6, 2, 3, 5, 7).flatten(4)
