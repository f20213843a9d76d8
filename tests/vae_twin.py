"""Diffusers' AutoencoderKLWan with the weights of one of our VAEs: what ours is compared with."""

from __future__ import annotations

from torch import Tensor

from benchmarks.vae import decode_whole, twin
from wan.vae.vae import VAE

__all__ = ["twin", "whole"]


def whole(vae: VAE, latents: Tensor) -> Tensor:
    """The twin's decode of a whole video [B, F, z_dim, h, w] at once, to [B, frames, 3, H, W]."""
    return decode_whole(twin(vae), vae, latents)
