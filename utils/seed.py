"""Seeds and noise of videos.

A video's noise follows from (seed, prompt index, sample index) and from nothing else: not from the rank, the number of
ranks, the order of the videos, the batch a video is computed in, or the device. It is drawn on the CPU, with one
explicit generator a video. This file does not know what is done with the noise, and touches no global generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from utils.errors import InputError

_INT_BYTES = 16  # wide enough for any seed that is not a mistake


def _packed(name: str, value: int) -> bytes:
    try:
        return value.to_bytes(_INT_BYTES, "little", signed=True)
    except OverflowError as error:
        raise InputError(f"{name}: {value} is out of range. Use a whole number of at most 38 digits.") from error


def video_seed(seed: int, prompt_index: int, sample_index: int) -> int:
    """The seed of one video, in 0 .. 2**64 - 1, the same on every platform.

    BLAKE2b over the three integers, so that neighbouring seeds and indices give unrelated noise (seed + index would
    give sample 1 of seed 0 the noise of sample 0 of seed 1). PyTorch's CPU generator uses the low 32 bits of a seed:
    two of 5,000 videos get the same noise by chance in 3 of 1,000 cases.

    Raises InputError if an argument does not fit in 128 bits.
    """
    values = (("seed", seed), ("prompt_index", prompt_index), ("sample_index", sample_index))
    packed = b"".join(_packed(name, value) for name, value in values)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


class ZeroNoise:
    """Zeros in place of a NoiseStream's numbers, for rehearsals and measurements."""

    def __init__(self, batch: int = 1) -> None:
        self._batch = batch

    def normal(self, shape: Sequence[int]) -> Tensor:
        return torch.zeros(self._batch, *shape)


class NoiseStream:
    """The noise of a batch of B videos, drawn piece by piece, each video from its own generator.

    Draws go in the order in which the loop needs them: the initial noise of block 0, the noise of its re-noising steps,
    the initial noise of block 1, and so on. So a longer video begins like a shorter one of the same seed, and only one
    piece is in memory at a time. Every piece is drawn whether or not it is used in full: a stream is defined by the
    shapes it was asked for, in order.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        """`seeds`: one a video, 0 .. 2**64 - 1, as `video_seed` makes them."""
        if not seeds:
            raise ValueError("seeds is empty: a noise stream needs one seed for each video of the batch")
        self._generators = [torch.Generator(device="cpu").manual_seed(seed) for seed in seeds]

    @property
    def batch(self) -> int:
        """B, the number of videos."""
        return len(self._generators)

    def normal(self, shape: Sequence[int], pin: bool = False) -> Tensor:
        """The next piece of standard normal noise.

        `shape` is that of one video, [n, C, h, w]. Returns float32 [B, n, C, h, w] on the CPU, a new tensor each time;
        in page-locked memory (for copies that do not wait) if `pin` is set and a CUDA device is present.
        """
        noise = torch.empty(
            (self.batch, *shape), dtype=torch.float32, device="cpu", pin_memory=pin and torch.cuda.is_available()
        )
        for video, generator in zip(noise, self._generators, strict=True):
            video.normal_(generator=generator)
        return noise
