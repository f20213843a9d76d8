"""The conditions on what becomes of earlier frames beside what heads keep: sinks, positions, switches, rolling windows.

Published programs leave some combinations undefined, or compute what nobody can have meant; those are refused here.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from dummy.policies.registry import finds_roles
from dummy.policy import base_retention
from pipeline.config.settings import Settings
from utils.errors import InputError, require_range
from wan.geometry import MOST_FRAMES

_MOST_CUT = 1000  # latent frame; positions in training end at 21


def require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


@dataclass(frozen=True)
class SwitchRules:
    """Where prompt switches and scene cuts may be; `span` is what relative positions span, `rule` what sinks do."""

    rolling: bool
    kv_flush: bool
    rule: object | None
    span: int | None

    def check(self, frame: int, cut: bool = False, where: str = "prompt") -> None:
        """Raises InputError where there is no place for a switch at latent frame `frame`; the first prompt is none."""
        if not frame:
            require(not cut, "scene_cuts: nothing comes before the first prompt; a cut belongs to a switch")
            return
        require(not self.rolling, f"{where}: the blocks of a rolling window share one prompt; give a single one")
        require(
            self.kv_flush or self.rule is None,
            f"{where}: a prompt switch would encode earlier frames anew, which no program defines for {self.rule}; set "
            "kv_flush=true, by which only the text changes",
        )
        if not cut:
            return
        if not self.kv_flush or self.span is None:
            raise InputError(
                "scene_cuts: a cut moves its block away from what came before, which is defined for kv_flush=true and "
                "rope=relative; set both, or leave the cuts out"
            )
        require(
            frame >= self.span,
            f"scene_cuts: a cut at latent frame {frame} comes before the window of {self.span} frames is full; begin "
            f"the scene at {self.span} or later",
        )


def switch_rules(config: Settings) -> SwitchRules:
    """Those of the settings."""
    window = config.model_kwargs.local_attn_size
    span = (config.rope_window or window) if config.rope == "relative" else None
    rule = base_retention(config.model_kwargs, config.num_frame_per_block).rule
    return SwitchRules(config.rolling is not None, config.kv_flush, rule, span)


def check_cuts(starts: Collection[int], cuts: Collection[int], config: Settings, where: str) -> None:
    """The prompts of one video, which begin at the latent frames `starts`, some of them with a cut."""
    rules = switch_rules(config)
    for start in starts:
        rules.check(start, start in cuts, where)


def check_cache_rules(config: Settings) -> None:
    """All conditions of this file on one configuration. Raises InputError."""
    _check_first_block(config)
    _check_positions(config)
    _check_sinks(config)
    _check_rolling(config)


def _check_first_block(config: Settings) -> None:
    both = config.denoising_step_list_first_chunk, config.first_frame_denoising_step_list
    require(
        None in both,
        "first_frame_denoising_step_list: it and denoising_step_list_first_chunk say the same of videos without "
        "start_from, and different things with it; keep one of them",
    )


def _check_positions(config: Settings) -> None:
    window, span = config.model_kwargs.local_attn_size, config.rope_window
    require_range("scene_cut_from", config.scene_cut_from, 0, _MOST_CUT, "latent frames")
    if span is None:
        return
    require_range("rope_window", span, 1, MOST_FRAMES, "latent frames")
    require(config.rope == "relative", f"rope_window: {span} is for rope: relative; set rope=relative or remove it")
    require(
        span >= window,
        f"rope_window: {span} latent frames do not hold model_kwargs.local_attn_size {window}; use {window} or more",
    )


def _check_sinks(config: Settings) -> None:
    window, block, forcing = config.model_kwargs, config.num_frame_per_block, config.dummy_forcing
    base = base_retention(window, block)
    if base.rule is None:
        return
    key = "model_kwargs.rolling_sink" if window.rolling_sink else "model_kwargs.ema_sink_alpha"
    require(
        not (window.rolling_sink and window.ema_sink_alpha is not None),
        "model_kwargs.rolling_sink: it and model_kwargs.ema_sink_alpha are two answers to what becomes of old frames; "
        "keep one of them",
    )
    base.rule.check(base, block)
    needed = "absolute" if window.rolling_sink else "relative"
    require(config.rope == needed, f"{key}: its positions are those of rope: {needed}, got {config.rope}")
    require(
        not forcing.enabled or forcing.policy == "prune",
        f"{key}: policy {forcing.policy} says itself what heads keep, so that no head would have such sinks; use "
        "dummy_forcing.policy=prune, whose heads but the dummy ones keep what the window does, or dummy_forcing=off",
    )
    require(
        not (window.rolling_sink and finds_roles(forcing)),
        "model_kwargs.rolling_sink: heads must be told apart before the first block, since later the first frames are "
        "not kept for all; give dummy_forcing.roles, or use dummy_forcing=off",
    )


def check_rolling_length(frames: int, setting: str, block: int, steps: int) -> None:
    """Whether a rolling window has its blocks in a video that `setting` makes so many latent frames long. Raises
    InputError."""
    require(
        frames >= steps * block,
        f"{setting}: {frames} are fewer than the {steps} blocks of {block} that a rolling window denoises at once; use "
        f"{steps * block} or more",
    )


def _check_rolling(config: Settings) -> None:
    if config.rolling is None:
        return
    block, steps, most = config.num_frame_per_block, len(config.denoising_step_list), config.rolling.max_attention
    forcing = config.dummy_forcing
    require_range("rolling.max_attention", most, 1, MOST_FRAMES, "latent frames")
    require(
        most >= (steps + 1) * block,
        f"rolling.max_attention: {most} latent frames do not hold the {steps} blocks of {block} that are at work, one "
        f"for each denoising step, and the first block; use {(steps + 1) * block} or more",
    )
    check_rolling_length(config.num_output_frames, "num_output_frames", block, steps)
    others = {
        "rope": config.rope == "relative",
        "denoising_step_list_first_chunk": config.denoising_step_list_first_chunk is not None,
        "first_frame_denoising_step_list": config.first_frame_denoising_step_list is not None,
        "start_from": config.start_from is not None,
        "model_kwargs.ema_sink_alpha": config.model_kwargs.ema_sink_alpha is not None,
        "model_kwargs.rolling_sink": config.model_kwargs.rolling_sink,
        "dummy_forcing.teacache_enabled": forcing.enabled and forcing.teacache_enabled,
    }
    for key, wanted in others.items():
        require(not wanted, f"{key}: has no meaning with a rolling window (rolling); remove one of the two")
    require(
        not finds_roles(forcing),
        "rolling: head roles are found in the clean pass of one block that all heads see alike, which a rolling window "
        "does not have; give dummy_forcing.roles, use dummy_forcing.policy=calibrated or dummy_forcing=off",
    )
    require(
        not forcing.online,
        "dummy_forcing.calibration: online sees the errors of a block that is denoised alone, which a rolling window "
        "(rolling) does not have; use a calibration file, or dummy_forcing=off",
    )
