"""What a video of any model shows, by its pixels alone: nearness to another, motion, drift, seams.

Videos are uint8 [frames, H, W, 3]. SSIM is torchmetrics', optical flow OpenCV's (`pip install -e .[compare]`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shapes.measure import psnr, seam
from utils.errors import InputError

PACKAGES = {"torchmetrics": "torchmetrics", "cv2": "opencv-python-headless"}  # by the module that they bring
PIECE = 8  # frames whose SSIM is computed at a time


@dataclass(frozen=True)
class Measures:
    """`psnr` in dB (at most 60) and `ssim` are against a reference; `drift` is the median over
    pixels of the change from the first to the last frame, in levels of 0..255: that of the background, where things
    that move cover less than half. `seam` is the change across block borders over that within blocks, `motion` the mean
    optical flow in pixels a frame (the dynamic degree)."""

    psnr: float
    ssim: float
    drift: float
    seam: float
    motion: float


def require_libraries() -> None:
    """Raises InputError if a library is missing."""
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise InputError(f"benchmarks.compare: packages are missing; pip install {' '.join(missing)}")


def measure(video: Tensor, reference: Tensor, borders: Sequence[int]) -> Measures:
    """`borders`: the first frame of every block but the first; before the second block no policy has anything to
    forget, so nearness is measured from there on."""
    pixels, other = (one.numpy() for one in (video, reference))
    floats = pixels.astype(np.float32) / 255
    first = borders[0] if borders else 0
    return Measures(
        psnr(floats[first:], other[first:].astype(np.float32) / 255),
        ssim(video[first:], reference[first:]),
        255 * float(np.median(np.abs(floats[-1] - floats[0]).mean(-1))),
        seam(floats, borders),
        float(flow_speed(pixels).mean()),
    )


def ssim(video: Tensor, reference: Tensor) -> float:
    """The mean over frames (Wang et al. 2004: a Gaussian window of 11 x 11)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    found = []
    for pair in zip(video.split(PIECE), reference.split(PIECE), strict=True):
        one, other = (frames.permute(0, 3, 1, 2).float() / 255 for frames in pair)
        found.append(structural_similarity_index_measure(one, other, data_range=1.0, reduction="none"))
    return float(torch.cat([values.reshape(-1) for values in found]).mean())


def flow_speed(video: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """How far every pixel moves into the next frame [frames - 1, H, W], in pixels (dense inverse search)."""
    import cv2

    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in video]
    flows = [search.calc(one, other, None) for one, other in pairwise(grey)]
    speed: npt.NDArray[np.float32] = np.linalg.norm(np.stack(flows), axis=-1)
    return speed
