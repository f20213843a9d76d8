"""From the YAML files of Self-Forcing and its relatives to this program's settings.

Those files (Self-Forcing, LongLive, Dummy Forcing and its forks, Causal Forcing, CausVid, Reward Forcing, Rolling
Forcing, One-Forcing, Krea) carry keys of training and of evaluation that have no use here, features that this program
lacks, and a few spellings of their own. This file drops the first with one warning, refuses the second by their names
and rewrites the third; it checks no ranges and builds no dataclass.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

from utils.errors import InputError, quoted
from utils.prompts import frame_list

logger = logging.getLogger(__name__)

_WITHOUT_USE_BY_TOPIC = (
    # distribution over GPUs and precision
    "sharding_strategy text_encoder_fsdp_wrap_strategy text_encoder_cpu_offload mixed_precision gradient_checkpointing",
    "generator_cpu_offload generator_activation_cpu_offload",
    # distillation
    "real_name fake_name ts_schedule ts_schedule_max min_score_timestep generator_name generator_task generator_grad",
    "num_train_timestep guidance_scale real_guidance_scale fake_guidance_scale denoising_loss_type negative_prompt",
    "dfake_gen_update_ratio distribution_loss distillation_loss backward_simulation trainer same_step_across_blocks",
    "last_step_only sid_alpha concat_time_embeddings critic_timestep_shift teacher_forcing teacher_model_path",
    "noise_augmentation_max_timestep relativistic_discriminator discrete_cd_N spatial_sf lookahead beta all_causal",
    "use_multi_rollout num_rollouts gradient_num_blocks score_num_frames real_task_type fake_task_type",
    "independent_first_frame causal is_causal i2v",
    # optimiser and loop
    "lr lr_critic beta1 beta2 beta1_critic beta2_critic weight_decay batch_size total_batch_size grad_accum",
    "gradient_accumulation_steps max_grad_norm_generator max_grad_norm_critic ema_weight ema_start_step max_steps",
    "log_iters gc_interval max_iters max_checkpoints logdir config_name no_save no_visualize auto_resume resume_ckpt",
    "resume_ema_from_ckpt full_training_steps",
    # training data
    "image_or_video_shape load_raw_video num_training_frames min_num_training_frames slice_last_frames dataset_type",
    "clear_context memorize train_first_chunk switch_mode switch_choices switch_prompt_path dataloader_num_workers",
    "lmdb_readahead real_data_path real_dataset_type prompt_embedding_cache_path",
    # evaluation, sizes that are asked of the model, and a switch for the profile, which is always made here
    "ckpt_step prompt_name profile frame_seq_length num_transformer_blocks",
)
# Keys of which something here does the work, and what that is.
INSTEAD = {
    "num_frames": "num_output_frames, which counts latent frames: 21 make 81",
    "height": "resolution=[height,width]",
    "width": "resolution=[height,width]",
    "prompt_path": "data_path",
    "prompt_file_path": "data_path",
    "eval_first_n": "inference_iter",
    "checkpoint_path": "generator_ckpt",
    "output_path": "output_folder",
    "wan_model_base_path": "model_root",
    "num_denoising_steps": "denoising_step_list",
    "method": "dummy_forcing.enabled",
    "forcing": "dummy_forcing",
    "use_taehv": "decoder=taehv:FILE",
    "enable_fp8": "precision=fp8",
    "use_trt": "engine",
    "compile_ffn": "engine",
    "torch_compile": "engine",
    "use_teacache": "dummy_forcing.teacache_enabled",
    "teacache_rel_l1_thresh": "dummy_forcing.teacache_threshold",
}
WITHOUT_USE = frozenset(name for names in _WITHOUT_USE_BY_TOPIC for name in names.split()) | INSTEAD.keys()
WITHOUT_USE_PREFIXES = (
    *("wandb_", "reward_", "vis_", "val_", "streaming_", "generator_fsdp_", "real_score_", "fake_score_", "gan_"),
    *("discriminator_", "r1_", "r2_"),
)

# Keys that change what is computed: only the value with which the published text-to-video checkpoints run is accepted.
ONLY_VALUE = {"independent_first_frame": False, "i2v": False, "causal": True, "is_causal": True}

# Features of other programs, by the keys that ask for them; switched off (null, false, nothing) they are dropped.
NOT_SUPPORTED = {
    "reference_images": "reference images",
    "forcingkv": "Forcing-KV",
    "use_pyramidkv": "Pyramid Forcing's cache",
    "do_kv_recomp": "a cache that is computed anew before each block",
    "kv_quant": "a quantised cache",
}
METHODS = ("dummy_forcing", "self_forcing", "longlive", "causal_forcing")  # that `method` of a fork may say
_LONGLIVE_2 = ("infra", "checkpoints", "algorithm", "training", "data", "inference", "evaluation", "logging")

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
    _refuse_other_programs(mapping)
    settings = _drop_without_use(mapping)
    _translate_timestep_shift(settings)
    _translate_infinite_attention(settings)
    _translate_dummy_forcing(settings)
    _translate_steps(settings)
    if settings.get("loras", ()) is None:
        settings["loras"] = []
    if "switch_frame_indices" in settings:
        frames = settings["switch_frame_indices"]
        nothing = frames is None or (isinstance(frames, str) and frames.lower() in ("none", ""))
        settings["switch_frame_indices"] = [] if nothing else frame_list(frames, "switch_frame_indices")
    return settings


def _refuse_other_programs(mapping: Mapping[str, object]) -> None:
    sections = [key for key in _LONGLIVE_2 if isinstance(mapping.get(key), Mapping)]
    if len(sections) > 1:
        raise InputError(
            f"{', '.join(sections)}: sections of a file of LongLive 2.0, whose model, Wan2.2-TI2V-5B, is not "
            "supported; of LongLive the first version is, see configs/longlive_inference.yaml"
        )
    wanted = [f"{key}: {what} is not supported" for key, what in _unsupported(mapping)]
    if wanted:
        raise InputError(
            f"{'; '.join(wanted)} yet. Videos made without it would be others; use a checkpoint and a file that do "
            "not ask for it"
        )


def _unsupported(mapping: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    for key, what in NOT_SUPPORTED.items():
        if mapping.get(key):
            yield key, what
    method = mapping.get("method")
    if method is not None and method not in METHODS:
        yield "method", quoted(str(method))


def _drop_without_use(mapping: Mapping[str, object]) -> dict[str, object]:
    dropped = [key for key in mapping if key in WITHOUT_USE or key.startswith(WITHOUT_USE_PREFIXES)]
    for key in dropped:
        if key in ONLY_VALUE and mapping[key] is not ONLY_VALUE[key]:
            only = str(ONLY_VALUE[key]).lower()
            found = quoted(str(mapping[key]).lower()).strip("'")
            raise InputError(f"{key}: {found} is not supported; remove the key or set it to {only}")
    if dropped:
        told = [f"{key} (use {INSTEAD[key]})" if key in INSTEAD else key for key in dropped]
        logger.warning("keys without a use here are ignored: %s", ", ".join(told))
    return {key: value for key, value in mapping.items() if key not in (*dropped, *NOT_SUPPORTED)}


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
    if isinstance(section, str) and section.lower() in _OFF:
        section = None
    if section is None or isinstance(section, bool):
        settings["dummy_forcing"] = {"enabled": section is True}


def _translate_steps(settings: dict[str, object]) -> None:
    """A final 0 marks the clean image in files whose steps are not warped; it is no step."""
    steps = settings.get("denoising_step_list")
    if isinstance(steps, list) and len(steps) > 1 and steps[-1] == 0:
        settings["denoising_step_list"] = steps[:-1]
        settings.setdefault("warp_denoising_step", False)
