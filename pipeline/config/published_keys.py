"""From the YAML files of Self-Forcing, LongLive and Dummy Forcing to this program's settings.

Those files carry keys of training and of evaluation that have no use here, and a few spellings of their own. This file
drops the former with one warning and rewrites the latter; it checks no ranges and builds no dataclass.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from utils.errors import InputError

logger = logging.getLogger(__name__)

_WITHOUT_USE_BY_TOPIC = (
    # distribution over GPUs and precision
    "generator_fsdp_wrap_strategy real_score_fsdp_wrap_strategy fake_score_fsdp_wrap_strategy sharding_strategy",
    "text_encoder_fsdp_wrap_strategy text_encoder_cpu_offload mixed_precision gradient_checkpointing",
    # distillation
    "real_name fake_name real_score_ckpt fake_score_ckpt ts_schedule ts_schedule_max min_score_timestep",
    "num_train_timestep guidance_scale real_guidance_scale fake_guidance_scale denoising_loss_type negative_prompt",
    "dfake_gen_update_ratio distribution_loss trainer same_step_across_blocks last_step_only sid_alpha",
    "discriminator_lr_multiplier gan_g_weight gan_d_weight concat_time_embeddings r1_weight r2_weight r1_sigma",
    "r2_sigma critic_timestep_shift teacher_forcing noise_augmentation_max_timestep",
    "independent_first_frame causal i2v",
    # optimiser and loop
    "lr lr_critic beta1 beta2 beta1_critic beta2_critic weight_decay batch_size total_batch_size",
    "gradient_accumulation_steps max_grad_norm_generator max_grad_norm_critic ema_weight ema_start_step",
    "log_iters gc_interval max_iters max_checkpoints logdir config_name no_save no_visualize auto_resume",
    # training data
    "image_or_video_shape load_raw_video num_training_frames min_num_training_frames slice_last_frames",
    "clear_context memorize train_first_chunk switch_mode switch_choices switch_prompt_path",
    # evaluation, and a switch for the profile, which is always made here
    "ckpt_step prompt_name prompt_path eval_first_n height width num_frames profile",
)
WITHOUT_USE = frozenset(name for names in _WITHOUT_USE_BY_TOPIC for name in names.split())
WITHOUT_USE_PREFIXES = ("wandb_", "reward_", "vis_", "val_", "streaming_")

# Keys that change what is computed: only the value with which the published text-to-video checkpoints run is accepted.
ONLY_VALUE = {"independent_first_frame": False, "i2v": False, "causal": True}

_OFF = frozenset({"off", "false", "no", "null", "none", "~"})
_ON = frozenset({"on", "true", "yes"})


def expand_overrides(overrides: Sequence[str]) -> list[str]:
    """`dummy_forcing=off` and `=on` switch the section without forgetting what else the file says in it."""
    expanded = []
    for override in overrides:
        key, _, value = override.partition("=")
        word = value.strip().lower()
        if key.strip() == "dummy_forcing" and word in _OFF | _ON:
            override = f"dummy_forcing.enabled={'true' if word in _ON else 'false'}"
        expanded.append(override)
    return expanded


def translate(mapping: Mapping[str, object]) -> dict[str, object]:
    """Settings in the form that `InferenceConfig` is built from; logs one warning that names every key dropped.

    Raises:
        InputError: a dropped key asks for what this program does not do, or two keys say the same thing differently.
    """
    settings = _drop_without_use(mapping)
    _translate_timestep_shift(settings)
    _translate_infinite_attention(settings)
    _translate_dummy_forcing(settings)
    _translate_steps(settings)
    if "switch_frame_indices" in settings:
        settings["switch_frame_indices"] = _frame_list(settings["switch_frame_indices"])
    return settings


def _drop_without_use(mapping: Mapping[str, object]) -> dict[str, object]:
    dropped = [key for key in mapping if key in WITHOUT_USE or key.startswith(WITHOUT_USE_PREFIXES)]
    for key in dropped:
        if key in ONLY_VALUE and mapping[key] is not ONLY_VALUE[key]:
            only = str(ONLY_VALUE[key]).lower()
            found = str(mapping[key]).lower()
            raise InputError(f"{key}: {found} is not supported; remove the key or set it to {only}")
    if dropped:
        logger.warning("keys without a use here are ignored: %s", ", ".join(dropped))
    return {key: value for key, value in mapping.items() if key not in dropped}


def _translate_timestep_shift(settings: dict[str, object]) -> None:
    """Self-Forcing files state the shift at the top level too."""
    if "timestep_shift" not in settings:
        return
    shift = settings.pop("timestep_shift")
    section = _model_kwargs(settings)
    if section is None:
        return
    inner = section.setdefault("timestep_shift", shift)
    if inner != shift:
        raise InputError(
            f"timestep_shift: {shift} disagrees with model_kwargs.timestep_shift: {inner}; keep only the latter"
        )


def _translate_infinite_attention(settings: dict[str, object]) -> None:
    """LongLive's long-video file: `model_kwargs.use_infinite_attention: true` is `rope: relative` here."""
    section = _model_kwargs(settings)
    if section is None or "use_infinite_attention" not in section:
        return
    wanted = section.pop("use_infinite_attention")
    if not isinstance(wanted, bool):
        raise InputError(f"model_kwargs.use_infinite_attention: expected true or false, got {wanted!r}")
    if wanted and settings.setdefault("rope", "relative") != "relative":
        raise InputError(
            f"rope: {settings['rope']} disagrees with model_kwargs.use_infinite_attention: true; set rope=relative or "
            "model_kwargs.use_infinite_attention=false"
        )


def _model_kwargs(settings: dict[str, object]) -> dict[str, object] | None:
    """A copy of the section, put in its place (made if it is absent); None where it is no section at all."""
    section = settings.get("model_kwargs")
    if section is not None and not isinstance(section, dict):
        return None  # reported with its type when the dataclass is built
    copy: dict[str, object] = dict(section or {})
    settings["model_kwargs"] = copy
    return copy


def _translate_dummy_forcing(settings: dict[str, object]) -> None:
    """Absent, null or false is off; true is on with the defaults."""
    section = settings.get("dummy_forcing")
    if section is None or isinstance(section, bool):
        settings["dummy_forcing"] = {"enabled": section is True}


def _translate_steps(settings: dict[str, object]) -> None:
    """A final 0 marks the clean image in files whose steps are not warped; it is no step."""
    steps = settings.get("denoising_step_list")
    if isinstance(steps, list) and len(steps) > 1 and steps[-1] == 0:
        settings["denoising_step_list"] = steps[:-1]
        settings.setdefault("warp_denoising_step", False)


def _frame_list(value: object) -> object:
    """Published storyboards write the frames as one text, `40, 80, 120`."""
    if value is None:
        return []
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    if not isinstance(value, str):
        return value
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise InputError(f"switch_frame_indices: expected latent frames such as 40, 80, 120, got {value!r}")
    return [int(part) for part in parts]
