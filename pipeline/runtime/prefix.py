"""Where a video begins if not from noise: an image or the frames of another video, as latents of whole blocks.

An image is one latent frame, so it suits checkpoints that go frame by frame; blocks of n latent frames need a video of
at least 1 + 4 (n - 1) frames. The file knows nothing of prompts and of what is generated afterwards.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.config import InferenceConfig
from pipeline.config.jobs import VideoJob
from utils.errors import InputError
from utils.media import Media, open_media
from utils.video_probe import Frames
from wan.geometry import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION
from wan.vae.vae import VAE

logger = logging.getLogger(__name__)

_SAME_SPEED = 0.05  # a difference in speed that is not worth a word


@dataclass(frozen=True)
class VideoLength:
    """How many latent `frames` the video has that begins with a file, under which setting, and whether it calibrates
    itself by a block that it makes."""

    frames: int
    setting: str
    online: bool


def load_prefix(path: Path, config: InferenceConfig, vae: VAE, length: VideoLength | None = None) -> Tensor:
    """Latents [1, F, C, h, w] of the image or video in `path`, F a multiple of the block and less than the video.

    Frames are taken as they are shown: upright, with square pixels, one by one at the file's own rate. Raises
    InputError for a file that cannot be read, is too short or too long, or has another size than the configuration
    (unless `start_from_fit` is set). The `length` of the video is the configuration's unless given.
    """
    media = check_prefix(path, config, length)
    left_out = _first_used(media, config, length)
    if left_out:
        logger.warning(
            "start_from: the first %d frames of %s are left out, so that whole blocks remain", left_out, path
        )
    if media.fps is not None and abs(media.fps / config.fps - 1) > _SAME_SPEED:
        logger.warning(
            "start_from: %s has %.4g frames a second, the video %g, so that it begins at %.2g times its speed; convert "
            "the file first to keep it: ffmpeg -i IN -r %g OUT",
            *(path, media.fps, config.fps, config.fps / media.fps, config.fps),
        )
    frames = torch.from_numpy(_read(media)[left_out:].copy())  # [frames, H, W, 3]
    video = torch.cat([_fitted(_as_values(frame[None]), config) for frame in frames])
    return vae.encode(_padded(video, config)[None])


def check_start_files(config: InferenceConfig, jobs: Sequence[VideoJob]) -> None:
    """See that all files that `jobs` start from can be used, before minutes go into loading. Raises InputError."""
    for path in dict.fromkeys(job.start_from for job in jobs):
        if path is not None:
            check_prefix(path, config)


def check_prefix(path: Path, config: InferenceConfig, length: VideoLength | None = None) -> Media:
    """What `path` holds, once it is found to suit the configuration. Raises InputError as `load_prefix`."""
    try:
        media = open_media(path)
    except InputError as error:
        raise InputError(f"start_from: {error}") from error
    _first_used(media, config, length)
    height, width = config.pixel_size
    if (media.height, media.width) != (height, width) and not config.start_from_fit:
        raise InputError(
            f"start_from: {path} is {media.height} x {media.width} pixels (height x width, as shown), the video "
            f"{height} x {width}; set start_from_fit=true to resize and crop it, or resolution to its size"
        )
    return media


def _read(media: Media) -> Frames:
    try:
        return media.read()
    except InputError as error:
        raise InputError(f"start_from: {error}") from error


def _first_used(media: Media, config: InferenceConfig, length: VideoLength | None) -> int:
    """How many leading frames to leave out so that whole blocks remain; 0 if all fit."""
    length = length or VideoLength(config.num_output_frames, "num_output_frames", config.dummy_forcing.online)
    block, frames = config.num_frame_per_block, media.frames
    latents = (frames - 1) // TEMPORAL_COMPRESSION + 1
    whole = latents - latents % block
    if whole == 0:
        needed = 1 + TEMPORAL_COMPRESSION * (block - 1)
        raise InputError(
            f"start_from: {media.path} has {frames} frames, but blocks of num_frame_per_block {block} need {needed} or "
            "more; an image starts a video with frame-wise checkpoints (num_frame_per_block: 1)"
        )
    if whole >= length.frames:
        raise InputError(
            f"start_from: {media.path} is {whole} latent frames long, which leaves nothing to make of "
            f"{length.setting} {length.frames}; use {length.setting}={whole + block} or more"
        )
    if length.online and whole + block >= length.frames:
        raise InputError(
            f"start_from: {media.path} is {whole} latent frames long, and dummy_forcing.calibration=online goes by "
            f"what the block after them shows, but {length.setting} {length.frames} makes no other after that one; use "
            f"{length.setting}={whole + 2 * block} or more, or a calibration file"
        )
    return frames - (1 + TEMPORAL_COMPRESSION * (whole - 1))


def _as_values(frames: Tensor) -> Tensor:
    """uint8 [frames, H, W, 3] as float [frames, 3, H, W] in [-1, 1]."""
    return frames.permute(0, 3, 1, 2).float() / 127.5 - 1


def _fitted(video: Tensor, config: InferenceConfig) -> Tensor:
    """video [frames, 3, H, W] at the configured size: scaled to cover it and cropped around the centre."""
    height, width = config.pixel_size
    if tuple(video.shape[2:]) == (height, width):
        return video
    scale = max(height / video.shape[2], width / video.shape[3])
    size = max(height, round(video.shape[2] * scale)), max(width, round(video.shape[3] * scale))
    video = F.interpolate(video, size, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return video[:, :, top : top + height, left : left + width]


def _padded(video: Tensor, config: InferenceConfig) -> Tensor:
    """The rows that are cropped from the result (1088 to 1080) repeat the last one."""
    rows = config.latent_size[0] * SPATIAL_COMPRESSION - video.shape[2]
    return F.pad(video, (0, 0, 0, rows), mode="replicate") if rows else video
