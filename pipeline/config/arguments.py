"""What a program gives to `Pipeline` and `Session`, checked as settings of a file are.

Everything here raises InputError, which names the argument, its value and what would do; whole numbers of other
libraries (NumPy, PyTorch) are as good as Python's.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import SupportsIndex, cast

from pipeline.config.checks import check_switch_frames
from pipeline.config.config import InferenceConfig, as_dict, load_config
from utils.errors import InputError, brief
from utils.prompts import prompt_text

NOISE_SEEDS = 2**64
SESSION_SETTINGS = frozenset(
    ("dummy_forcing", "model_kwargs", "rope", "rope_window", "rolling", "global_sink", "kv_flush", "scene_cut_from")
) | frozenset(
    ("context_noise", "denoising_step_list", "denoising_step_list_first_chunk", "first_frame_denoising_step_list")
)
"""What sessions of one pipeline may differ in: what heads keep, and how blocks are denoised."""


def whole_number(name: str, value: object, least: int, below: int) -> int:
    """The number, from `least` on and less than `below`."""
    try:
        number = None if isinstance(value, bool) else operator.index(cast(SupportsIndex, value))
    except TypeError:
        number = None
    if number is None or not least <= number < below:
        raise InputError(f"{name}: expected a whole number from {least} to {below - 1}, got {brief(value)}")
    return number


def given_seeds(noise_seeds: object) -> list[int]:
    """The seeds of a batch, one or more."""
    seeds = _listed("noise_seeds", noise_seeds, "whole numbers, one for each video")
    if not seeds:
        raise InputError("noise_seeds: holds no seed; give one for each video of the batch, or leave it out")
    return [whole_number(f"noise_seeds[{place}]", seed, 0, NOISE_SEEDS) for place, seed in enumerate(seeds)]


def given_overrides(overrides: object) -> tuple[str, ...]:
    """`key=value` texts."""
    return tuple(_texts("overrides", overrides, '"key=value" texts, such as ["dummy_forcing=off"]'))


def session_config(config: InferenceConfig, overrides: Sequence[str]) -> InferenceConfig:
    """The settings of a session with `overrides` of its own, of a pipeline with the settings `config`."""
    own = load_config(config, overrides)
    usual = as_dict(config)
    others = {key for key, value in as_dict(own).items() if value != usual[key]} - SESSION_SETTINGS
    if others:
        raise InputError(
            f"{min(others)}: a session cannot have its own; it may have its own {', '.join(sorted(SESSION_SETTINGS))}. "
            "Make another pipeline for the rest."
        )
    return own


def given_prompts(prompts: object) -> list[str]:
    """Prompts of several videos, in a list."""
    return [prompt_text(text, "prompts") for text in _texts("prompts", prompts, "prompts")]


def given_prompt(prompt: object, videos: int) -> str | tuple[str, ...]:
    """A prompt for all videos, or one for each, as a prompt file would hold them."""
    if isinstance(prompt, str):
        return prompt_text(prompt, "prompt")
    texts = _texts("prompt", prompt, "prompts, one for each video", "a text, or ")
    if len(texts) != videos:
        raise InputError(f"prompt: {len(texts)} prompts for {videos} videos; give one, or one for each video")
    return tuple(prompt_text(text, "prompt") for text in texts)


def given_storyboard(
    storyboard: object, cuts: Collection[int], videos: int, block: int, frames: int
) -> list[tuple[int, str | tuple[str, ...], bool]]:
    """(latent frame, prompt, whether another scene begins) for a video of so many `frames`, in blocks."""
    entries = _listed("storyboard", storyboard, "pairs (latent frame, prompt)")
    board = []
    for place, entry in enumerate(entries):
        if not isinstance(entry, (tuple, list)) or len(entry) != 2:
            told = f'expected a pair (latent frame, prompt) such as (12, "A cat."), got {brief(entry)}'
            raise InputError(f"storyboard[{place}]: {told}")
        frame = whole_number(f"storyboard[{place}]", entry[0], 0, frames)
        board.append((frame, given_prompt(entry[1], videos), frame in cuts))
    starts = [frame for frame, _, _ in board]
    first = starts[:1] == [0]
    check_switch_frames(starts[first:], block, frames, "storyboard", "frames")
    absent = [cut for cut in cuts if cut not in starts]
    if absent:
        raise InputError(
            f"cuts: no prompt of the storyboard begins at {brief(absent)}; give its frames, {brief(starts)}"
        )
    return board


def given_path(name: str, value: object) -> Path:
    """The path of a file."""
    if not isinstance(value, (str, Path)) or not os.fspath(value):
        raise InputError(f"{name}: expected the path of a file, got {brief(value)}")
    return Path(value)


def _listed(name: str, value: object, what: str, alternative: str = "") -> Sequence[object]:
    if isinstance(value, (str, bytes, dict, set, frozenset)) or not isinstance(value, Iterable):
        raise InputError(f"{name}: expected {alternative}a list of {what}, got {brief(value)}")
    return list(value)


def _texts(name: str, value: object, what: str, alternative: str = "") -> list[str]:
    entries = _listed(name, value, what, alternative)
    others = [entry for entry in entries if not isinstance(entry, str)]
    if others:
        raise InputError(f"{name}: expected {alternative}a list of {what}, got {brief(others[0])} in it")
    return cast("list[str]", entries)
