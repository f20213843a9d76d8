"""A run's calibration: whether a file suits the run's model, video and weights, and the dial made of it."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import torch
from torch import Tensor

from dummy.calibration.candidates import CANDIDATES
from dummy.calibration.dial import Dial
from dummy.calibration.measured import Calibration, Subject
from pipeline.config.config import InferenceConfig
from utils.errors import InputError
from wan.checkpoints.diffusers_layout import read_generator
from wan.checkpoints.reading import read_tensors
from wan.config import ModelConfig

logger = logging.getLogger(__name__)

FIELD = "dummy_forcing.calibration"
KEY_TENSOR = 1 << 16  # numbers at most: biases, norms and modulations, which every training moves


def load_dial(config: InferenceConfig, sizes: ModelConfig, path: Path) -> Dial:
    """Raises InputError for a file that cannot be used, or is for another model or size of video."""
    calibration = Calibration.load(path, FIELD)
    fault = calibration.subject.fault(subject_of(config, sizes, ""))
    if fault is not None:
        raise InputError(f"{FIELD}: {path} {fault}; calibrate with this configuration: python -m pipeline.calibrate")
    if calibration.missing:
        had, wanted = len(calibration.videos), len(calibration.videos) + calibration.missing
        logger.warning("%s is measured in %d of %d videos; the command that made it goes on", path, had, wanted)
    return _dial(config, calibration)


def online_dial(config: InferenceConfig, sizes: ModelConfig) -> Dial:
    """For videos that calibrate themselves: the candidates, and no errors yet."""
    shape = 1, 1, sizes.num_layers, sizes.num_heads
    nothing = torch.zeros(*shape, len(CANDIDATES)), torch.zeros(shape)
    subject = subject_of(config, sizes, "")
    return _dial(config, Calibration(CANDIDATES, *nothing, (0,), ("denoising",), ("its own",), subject))


def _dial(config: InferenceConfig, calibration: Calibration) -> Dial:
    window = config.model_kwargs.local_attn_size if config.rope == "relative" else None
    past = config.num_output_frames - config.num_frame_per_block
    return Dial(calibration, past, config.dummy_forcing.max_lengths, window)


def subject_of(config: InferenceConfig, sizes: ModelConfig, checkpoint: str) -> Subject:
    """What a run of this configuration is about, with weights of that identity."""
    height, width = config.latent_size
    return Subject(
        sizes.num_layers,
        sizes.num_heads,
        sizes.head_dim,
        height,
        width,
        config.num_frame_per_block,
        config.num_output_frames,
        checkpoint,
    )


def compare_checkpoints(config: InferenceConfig, calibration: Calibration) -> None:
    """Warn of a calibration that was made with other weights of the same sizes."""
    if checkpoint_identity(config) != calibration.subject.checkpoint:
        logger.warning(
            "%s: %s was made with other weights (%s) than %s; it may serve, but how well nobody has measured. To be "
            "sure, calibrate with this configuration: python -m pipeline.calibrate",
            FIELD,
            config.dummy_forcing.calibration,
            calibration.about.get("weights", "unknown"),
            config.generator_path,
        )


def checkpoint_identity(config: InferenceConfig) -> str:
    """A hash of the small tensors of the generator's file as they are stored, and of those of LoRAs, if there are some.

    The same for every device and precision. Raises InputError for files that cannot be read.
    """
    state = read_generator(config.generator_path, config.use_ema)
    digest = hashlib.sha256()
    for name in sorted(state):
        _add(digest, name, state[name])
    for lora in config.lora_files:
        times = f" times {lora.strength}" if lora.strength != 1 else ""
        digest.update(f"LoRA {lora.adapter}{times}".encode())
        for name, tensor in sorted(read_tensors(lora.path).items()):
            if isinstance(tensor, Tensor):
                _add(digest, name, tensor)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    if tensor.numel() <= KEY_TENSOR:
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
