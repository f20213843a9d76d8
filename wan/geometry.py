"""Sizes of a latent video, and everything that follows from them.

The one place that turns latent height, width and frames into tokens, blocks and noise shapes. It knows nothing of
models or policies; nobody else multiplies these numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

TEMPORAL_COMPRESSION = 4  # pixel frames per latent frame of the Wan VAE, after the first
SPATIAL_COMPRESSION = 8  # pixels per latent row or column
MOST_FRAMES = 100_000  # latent frames in a setting, 7 hours; more is a slip of the keyboard, and some are lists


ENDLESS = 1 << 40  # about this many latent frames have a video that ends only when nobody wants more


@dataclass(frozen=True)
class LatentGeometry:
    """A video of `num_frames` latent frames of `height` x `width`, denoised `frames_per_block` at a time.

    `height` and `width` are latent sizes (pixels / 8) and even, since a token covers 2 x 2 of them.
    """

    height: int
    width: int
    num_frames: int
    frames_per_block: int
    channels: int = 16
    patch: tuple[int, int] = (2, 2)

    def __post_init__(self) -> None:
        assert self.height % self.patch[0] == 0 and self.width % self.patch[1] == 0
        assert self.num_frames % self.frames_per_block == 0

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens in a latent frame."""
        return self.height // self.patch[0], self.width // self.patch[1]

    @property
    def tokens_per_frame(self) -> int:
        """T; 1560 at 480p."""
        rows, columns = self.grid
        return rows * columns

    @property
    def tokens_per_block(self) -> int:
        return self.tokens_per_frame * self.frames_per_block

    def endless(self) -> LatentGeometry:
        """The same for a video without a last block."""
        return replace(self, num_frames=ENDLESS // self.frames_per_block * self.frames_per_block)

    @property
    def num_blocks(self) -> int:
        return self.num_frames // self.frames_per_block

    @property
    def block_shape(self) -> tuple[int, int, int, int]:
        """Shape [n, C, h, w] of one block of one video."""
        return self.frames_per_block, self.channels, self.height, self.width

    def block_starts(self, first_frame: int = 0) -> range:
        """The first latent frame of every block, from `first_frame` on."""
        return range(first_frame, self.num_frames, self.frames_per_block)


def pixel_frames(latent_frames: int, *, first: bool = True) -> int:
    """Pixel frames that `latent_frames` decode to; the first latent frame of a video becomes one frame, others four."""
    return latent_frames * TEMPORAL_COMPRESSION - (TEMPORAL_COMPRESSION - 1 if first and latent_frames else 0)
