"""How many earlier frames a head may see at a given speed: a steady block's time is measured at two lengths of history.

A block's time is taken to grow in proportion to the frames that heads see, which is what its operations do. It is
measured with all heads alike, on the engine that the run uses; what the split into roles costs beside is not in it.
"""

from __future__ import annotations

import logging
import statistics
import time
from dataclasses import replace

import torch

from dummy.policy import ContextPolicy
from pipeline.runtime.generator import BlockGenerator, Rollout
from pipeline.runtime.inputs import GeneratorSettings, Segment
from utils.errors import InputError
from utils.seed import ZeroNoise
from wan.attention.head_group import UNBOUNDED, Retention
from wan.geometry import LatentGeometry, pixel_frames
from wan.transformer.model import CausalWanModel

logger = logging.getLogger(__name__)

BLOCKS = 5  # a measurement, of which the first two are not counted: kernels are chosen and recorded in them


def at_speed(
    generator: BlockGenerator, geometry: LatentGeometry, speed: float, key: str = "equal_cost"
) -> GeneratorSettings:
    """The generator's settings, with as many frames for neighbour heads (policy calibrated: for all heads) as `speed`
    (pixel frames a second of diffusion, the VAE not counted) allows. Raises InputError, which names `key`, if blocks
    without any history are slower."""
    block, at_frames = geometry.frames_per_block, generator.settings.policy.at_frames
    assert at_frames is not None
    short, long = (block_seconds(generator, geometry, frames) for frames in (block, 4 * block))
    frames = frames_in_time(pixel_frames(block, first=False) / speed, (block, short), (4 * block, long))
    if frames < 0:
        fastest = pixel_frames(block, first=False) / (short - (long - short) / 3)
        raise InputError(
            f"dummy_forcing.{key}: {speed:g} pixel frames a second cannot be had here: blocks without any history "
            f"make {fastest:.3g}; use a lower speed, or window"
        )
    frames = min(frames, geometry.num_frames - block)  # there are no more in this video
    logger.info("%s: %g pixel frames/s leave %.2f earlier frames a head, as a mean over all heads", key, speed, frames)
    return replace(generator.settings, policy=at_frames(frames))


def frames_in_time(seconds: float, one: tuple[float, float], other: tuple[float, float]) -> float:
    """Frames of history that fit into `seconds`, from two measurements (frames, seconds); below 0 if none do."""
    slope = (other[1] - one[1]) / (other[0] - one[0])
    if slope <= 0:  # history costs less than can be measured
        return UNBOUNDED if one[1] <= seconds else -1.0
    return one[0] + (seconds - one[1]) / slope


def block_seconds(generator: BlockGenerator, geometry: LatentGeometry, frames: int) -> float:
    """Median time of a block's steps and clean pass with heads that all see `frames` earlier frames."""
    model, block = generator.model, geometry.frames_per_block
    policy = ContextPolicy("measured", Retention(0, frames))
    alike = BlockGenerator(model, replace(generator.settings, policy=policy), generator.passes)
    with torch.inference_mode():
        text = model.encode_text(torch.zeros(1, model.config.text_len, model.config.text_dim))
        measured = replace(geometry, num_frames=frames + BLOCKS * block)
        rollout = alike.start(measured, [Segment(0, text)], ZeroNoise())
        fill(rollout, range(frames), model)
        times = []
        for start in range(frames, measured.num_frames, block):
            begin = time.perf_counter()
            rollout.clean_pass(rollout.denoise(text, start // block), text, start, start // block)
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


def fill(rollout: Rollout, frames: range, model: CausalWanModel) -> None:
    """Let random keys and values stand for the given frames."""
    config, device = model.config, model.device
    tokens = rollout.cache.block_tokens // rollout.cache.frames_per_block
    shape = (1, len(frames) * tokens, config.num_heads, config.head_dim)
    noise = torch.Generator(device).manual_seed(0)
    for layer in rollout.cache.layers:
        k, v = (torch.randn(shape, generator=noise, device=device).to(model.dtype) for _ in "kv")
        layer.commit(k, v, frames)
