"""Where a video begins if not from noise: an image or the frames of another video, as latents of whole blocks.

An image is one latent frame, so it suits checkpoints that go frame by frame; blocks of n latent frames need a video of
at least 1 + 4 (n - 1) frames. The file knows nothing of prompts and of what is generated afterwards.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.config import InferenceConfig
from utils.errors import InputError
from utils.video import read_frames
from wan.geometry import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION
from wan.vae.vae import VAE

logger = logging.getLogger(__name__)


def load_prefix(path: Path, config: InferenceConfig, vae: VAE) -> Tensor:
    """Latents [1, F, C, h, w] of the image or video in `path`, F a multiple of the block and less than the video.

    Raises InputError for a file that cannot be read, is too short or too long, or has another size than the
    configuration (unless `start_from_fit` is set).
    """
    try:
        frames = torch.from_numpy(read_frames(path).copy())  # [frames, H, W, 3]
    except InputError as error:
        raise InputError(f"start_from: {error}") from error
    frames = frames[_first_used(path, len(frames), config) :]
    video = frames.permute(0, 3, 1, 2).float() / 127.5 - 1
    video = _fitted(path, video, config)
    return vae.encode(_padded(video, config)[None])


def _first_used(path: Path, frames: int, config: InferenceConfig) -> int:
    """How many leading frames to leave out so that whole blocks remain; 0 if all fit."""
    block = config.num_frame_per_block
    latents = (frames - 1) // TEMPORAL_COMPRESSION + 1 if frames else 0
    whole = latents - latents % block
    if whole == 0:
        needed = 1 + TEMPORAL_COMPRESSION * (block - 1)
        raise InputError(
            f"start_from: {path} has {frames} frames, but blocks of num_frame_per_block {block} need {needed} or more; "
            "an image starts a video with frame-wise checkpoints (num_frame_per_block: 1)"
        )
    if whole >= config.num_output_frames:
        raise InputError(
            f"start_from: {path} is {whole} latent frames long, which leaves nothing to make of num_output_frames "
            f"{config.num_output_frames}; use num_output_frames={whole + block} or more"
        )
    left_out = frames - (1 + TEMPORAL_COMPRESSION * (whole - 1))
    if left_out:
        logger.warning(
            "start_from: the first %d frames of %s are left out, so that whole blocks remain", left_out, path
        )
    return left_out


def _fitted(path: Path, video: Tensor, config: InferenceConfig) -> Tensor:
    """video [frames, 3, H, W] at the configured size: scaled to cover it and cropped around the centre, on request."""
    height, width = config.pixel_size
    if tuple(video.shape[2:]) == (height, width):
        return video
    if not config.start_from_fit:
        raise InputError(
            f"start_from: {path} is {video.shape[2]} x {video.shape[3]} pixels (height x width), the video {height} x "
            f"{width}; set start_from_fit=true to resize and crop it, or resolution to its size"
        )
    scale = max(height / video.shape[2], width / video.shape[3])
    size = max(height, round(video.shape[2] * scale)), max(width, round(video.shape[3] * scale))
    video = F.interpolate(video, size, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return video[:, :, top : top + height, left : left + width]


def _padded(video: Tensor, config: InferenceConfig) -> Tensor:
    """The rows that are cropped from the result (1088 to 1080) repeat the last one."""
    rows = config.latent_size[0] * SPATIAL_COMPRESSION - video.shape[2]
    return F.pad(video, (0, 0, 0, rows), mode="replicate") if rows else video
