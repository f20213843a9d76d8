"""The setting `resolution`: 480, 720, 1080, or [height, width] in pixels; what it is in pixels and in latents."""

from __future__ import annotations

from utils.errors import InputError
from wan.geometry import SPATIAL_COMPRESSION

Resolution = int | tuple[int, int]

# Rows of pixels -> latent rows and columns. 1080 is no multiple of 16: 1088 rows are made and 8 cropped.
_LATENT_SIZES = {480: (60, 104), 720: (90, 160), 1080: (136, 240)}
_PIXEL_MULTIPLE = 16  # a latent side of the VAE (8 pixels) times the patch's side (2)
MOST_PIXELS = 8192  # a side; 8K is 4320 x 7680, and needs more memory than any GPU has


def latent_size(resolution: Resolution) -> tuple[int, int]:
    """Latent height and width (h, w)."""
    if isinstance(resolution, int):
        return _LATENT_SIZES[resolution]
    return resolution[0] // SPATIAL_COMPRESSION, resolution[1] // SPATIAL_COMPRESSION


def pixel_size(resolution: Resolution) -> tuple[int, int]:
    """Height and width (H, W) of the written video, after the crop from 1088 to 1080 rows at `resolution: 1080`."""
    if isinstance(resolution, int):
        return resolution, _LATENT_SIZES[resolution][1] * SPATIAL_COMPRESSION
    return resolution


def check_resolution(resolution: Resolution) -> None:
    """Raises InputError for a size that no video can have; the message says what would do."""
    if isinstance(resolution, int):
        if resolution not in _LATENT_SIZES:
            raise InputError(
                f"resolution: {resolution} is none of 480, 720, 1080; write any other size as [height, width]"
            )
        return
    for side in resolution:
        near = min(max(round(side / _PIXEL_MULTIPLE), 1) * _PIXEL_MULTIPLE, MOST_PIXELS)
        if side > MOST_PIXELS:
            raise InputError(f"resolution: {list(resolution)}: {side} pixels are too many; use {near} or less")
        if side <= 0 or side % _PIXEL_MULTIPLE:
            raise InputError(
                f"resolution: {list(resolution)}: {side} pixels is no positive multiple of {_PIXEL_MULTIPLE}; "
                f"{near} is near (resolution: 1080 is cropped from 1088 rows by itself)"
            )
