"""The conditions on the settings of a run, alone and between them. Each raises InputError, which says what would do."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from dummy.policies.calibrated import Calibrated
from dummy.policies.registry import cache_policy, finds_roles, has_roles, policy_from_config
from pipeline.config.cache_rules import check_cache_rules, check_cuts, require
from pipeline.config.resolution import MOST_PIXELS, check_resolution
from pipeline.config.settings import Settings
from utils.errors import InputError, quoted, require_range, shown
from wan.geometry import MOST_FRAMES

# What no run can mean, though it may be a slip of the keyboard; each of these is built as a list somewhere.
MOST = {"num_samples": 10_000, "num_flickering_samples": 10_000, "samples_per_batch": 1_000}
_MOST_FPS = 1000
SEEDS = 2**63


def check_settings(config: Settings) -> None:
    """All conditions that need neither a file nor the model's sizes."""
    _check_schedule(config)
    _check_video(config)
    _check_run(config)
    _check_loras(config)
    _check_context(config)
    _check_dummy_forcing(config)
    check_cache_rules(config)
    check_switches(config.switch_frame_indices, config, "switch_frame_indices")


def _check_schedule(config: Settings) -> None:
    _check_steps("denoising_step_list", config.denoising_step_list)
    for name in ("denoising_step_list_first_chunk", "first_frame_denoising_step_list"):
        steps = getattr(config, name)
        if steps is not None:
            _check_steps(name, steps)
    require(
        0 <= config.context_noise <= 1000,
        f"context_noise: must be a timestep from 0 (clean) to 1000, got {config.context_noise}",
    )


def _check_steps(name: str, steps: Sequence[int]) -> None:
    """A list of denoising steps under the key `name`."""
    require(bool(steps), f"{name}: empty; the published list is [1000, 750, 500, 250]")
    require(all(1 <= step <= 1000 for step in steps), f"{name}: steps must be from 1 to 1000, got {list(steps)}")
    require(
        all(later < earlier for earlier, later in pairwise(steps)),
        f"{name}: steps must strictly decrease, got {list(steps)}",
    )


def _check_video(config: Settings) -> None:
    frames, block = config.num_output_frames, config.num_frame_per_block
    require_range("num_frame_per_block", block, 1, MOST_FRAMES)
    below, above = max(frames // block, 1) * block, max(frames // block + 1, 1) * block
    require(
        frames >= 1 and frames % block == 0,
        f"num_output_frames: {frames} is no positive multiple of num_frame_per_block {block}; use "
        + (f"{below} or {above}" if below < above else f"{below}"),
    )
    require(
        frames <= MOST_FRAMES,
        f"num_output_frames: {frames} latent frames are more than 7 hours; use {MOST_FRAMES // block * block} or less",
    )
    require_range("fps", config.fps, 1, _MOST_FPS, "pixel frames a second")
    require(0 <= config.video_crf <= 51, f"video_crf: must be from 0 to 51, got {config.video_crf}")
    check_resolution(config.resolution)


def _check_run(config: Settings) -> None:
    require(
        config.inference_iter == -1 or config.inference_iter >= 1,
        f"inference_iter: must be -1 (all prompts) or 1 or more, got {config.inference_iter}",
    )
    for name, most in MOST.items():
        require_range(name, getattr(config, name), 1, most, "videos")
    tile = config.vae_tile
    require(
        isinstance(tile, str) or (128 <= tile <= MOST_PIXELS and tile % 16 == 0),
        f"vae_tile: must be auto, never, or a multiple of 16 pixels from 128 to {MOST_PIXELS}, got {tile}",
    )
    preview = config.preview_path
    require(
        isinstance(tile, str) or preview is None,
        f"vae_tile: {tile} is for decoder: wan; {config.decoder} decodes whole frames, so use vae_tile=auto",
    )
    parallel = config.parallel
    require(
        parallel is None or re.fullmatch(r"heads(:[1-9][0-9]{0,3})?", parallel) is not None,
        f"parallel: expected heads, or heads:N for N processes, got {quoted(str(parallel))}",
    )
    require(
        parallel is None or not config.dummy_forcing.enabled or config.dummy_forcing.speed is None,
        f"dummy_forcing.{config.dummy_forcing.cost_key}: a speed is measured by each process for itself, and several "
        "that make one video must agree; give a number of frames instead, or remove parallel",
    )
    require(0 <= config.seed < SEEDS, f"seed: must be from 0 to 2**63 - 1, got {config.seed}")
    for name in ("device", "vae_device"):
        fits = re.fullmatch(r"auto|(cpu|cuda|mps|xpu)(:[0-9]{1,3})?", getattr(config, name))
        told = f"expected auto, cpu, cuda, cuda:1 or the like, got {quoted(getattr(config, name))}"
        require(fits is not None, f"{name}: {told}")


def _check_loras(config: Settings) -> None:
    """Twice the same file is a slip: its strength says how much of it there is to be."""
    seen: dict[Path, str] = {}
    for lora in config.lora_files:
        first = seen.setdefault(Path(os.path.abspath(lora.path)), lora.setting)
        require(
            first == lora.setting,
            f"{lora.setting}: {shown(lora.path)} is merged already ({first}); name it once in loras, with the strength "
            "that it is to have",
        )


def _check_context(config: Settings) -> None:
    window, sink, block = config.model_kwargs.local_attn_size, config.model_kwargs.sink_size, config.num_frame_per_block
    require(
        window == -1 or window >= sink + block,
        f"model_kwargs.local_attn_size: {window} latent frames do not hold sink_size {sink} and a block of {block}; "
        f"use {sink + block} or more, or -1 for all frames",
    )
    if config.rope == "absolute":
        return
    if has_roles(config.dummy_forcing):
        split = policy_from_config(config.model_kwargs, config.dummy_forcing, block).split
        assert split is not None
        sink = max(retention.sink for retention in split.by_role.values())
    require(
        window >= sink + block,
        f"rope: relative places {sink} sink frames and a block of {block} in a window of model_kwargs.local_attn_size "
        f"latent frames, got {window}; use {sink + block} or more (published: 12), or rope=absolute",
    )


def _check_dummy_forcing(config: Settings) -> None:
    forcing, block, blocks = config.dummy_forcing, config.num_frame_per_block, config.num_blocks
    if forcing.enabled:
        cache_policy(forcing)  # which refuses what it cannot use
    require(
        not forcing.costs_window or config.model_kwargs.local_attn_size != -1,
        f"dummy_forcing.{forcing.cost_key}: window is the cost of model_kwargs.local_attn_size, which is -1 (all "
        f"frames); set it (published: 12), or use dummy_forcing.{forcing.cost_key}=full",
    )
    _check_online(config)
    # Roles found in the last block would never be used; roles from a file need no block to find them in.
    if not finds_roles(forcing) or forcing.roles is not None or forcing.ar_start <= blocks - 2:
        return
    remedies = [f"num_output_frames={(forcing.ar_start + 2) * block} or more", "dummy_forcing.enabled=false"]
    if blocks >= 3:
        remedies.insert(0, f"dummy_forcing.ar_start={blocks - 2} or less")
    raise InputError(
        f"dummy_forcing.ar_start: head roles are found in block {forcing.ar_start} (counted from 0) and used after it, "
        f"but num_output_frames {config.num_output_frames} makes only {blocks} block{'s'[: blocks > 1]} of {block}; "
        f"use {', or '.join(remedies)}"
    )


def check_switches(switches: Sequence[int], config: Settings, where: str) -> None:
    """Prompt switches (latent frames, of the YAML or of a storyboard's line) that every prompt is seen with.

    Raises:
        InputError: not increasing, past the end, or two in one block; `where` begins the message.
    """
    check_cuts(switches, (), config, where)
    check_switch_frames(switches, config.num_frame_per_block, config.num_output_frames, where, "num_output_frames")


def check_switch_frames(switches: Sequence[int], block: int, length: int, where: str, setting: str) -> None:
    """The same of a video that `setting` makes so many latent frames long, in blocks. Raises InputError."""
    frames = list(switches)
    require(
        all(frame >= 1 for frame in frames) and frames == sorted(set(frames)),
        f"{where}: must be positive and strictly increasing latent frames, got {frames}",
    )
    starts = [-(-frame // block) * block for frame in frames]  # the first block that starts at or after the switch
    latest = length - block
    remedy = f"use {latest} or less, or a longer video" if latest > 0 else "make the video longer"
    for frame, start in zip(frames, starts, strict=True):
        require(
            start < length,
            f"{where}: no block starts at or after frame {frame} in {setting} {length}; {remedy}",
        )
    require(
        len(set(starts)) == len(starts),
        f"{where}: {frames} take effect at frames {starts} (blocks of {block}); two switches in one block "
        "leave a prompt unseen, so move them apart",
    )


def _check_online(config: Settings) -> None:
    """Raises InputError for a video that ends before what it shows of its heads could be used."""
    forcing, block, blocks = config.dummy_forcing, config.num_frame_per_block, config.num_blocks
    if not forcing.online:
        return
    policy = cache_policy(forcing)
    assert isinstance(policy, Calibrated)
    observed = policy.observed_block(block, config.model_kwargs.local_attn_size if config.rope == "relative" else None)
    require(
        observed <= blocks - 2,
        f"dummy_forcing.calibration: online sees heads' errors in block {observed} (counted from 0) and goes by them "
        f"after it, but num_output_frames {config.num_output_frames} makes only {blocks} block{'s'[: blocks > 1]} of "
        f"{block}; use num_output_frames={(observed + 2) * block} or more, a smaller "
        "dummy_forcing.options.observed_after, or a calibration file",
    )
