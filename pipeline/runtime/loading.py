"""From files to the parts of a pipeline, each loaded on its own so that no two large ones need be there together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dummy.policies.registry import policy_from_config
from dummy.roles import HeadRoles
from pipeline.config.config import InferenceConfig, check_against_model
from pipeline.runtime.calibrated import compare_checkpoints, load_dial, online_dial
from pipeline.runtime.engine import check_engine
from pipeline.runtime.inputs import GeneratorSettings
from pipeline.runtime.published_schedule import warn_of_another_schedule
from pipeline.runtime.schedule import DenoisingSchedule
from utils.errors import InputError, shown
from utils.user_paths import exists, is_folder, require_file, require_folder
from wan.attention.backends import attention_backend
from wan.attention.varlen import ragged_backend
from wan.checkpoints.diffusers_layout import read_generator, read_model_config
from wan.checkpoints.files import TooLarge, download_hint, relative_hint
from wan.checkpoints.filling import load_into
from wan.checkpoints.kinds import require_sizes
from wan.checkpoints.lora import merge_lora
from wan.checkpoints.published import backbone_of
from wan.checkpoints.reading import read_tensors
from wan.config import AdapterConfig, ModelConfig
from wan.text import TextEncoder
from wan.transformer.fp8 import check_fp8, to_fp8
from wan.transformer.model import CausalWanModel
from wan.transformer.sharded import load_sharded
from wan.vae.preview import SOURCE_HINT, PreviewDecoder
from wan.vae.streaming import LatentDecoder
from wan.vae.vae import VAE

logger = logging.getLogger(__name__)

META = torch.device("meta")
TEXT_ENCODER_HEADROOM = 12 << 30  # bytes free on the device from which on the 10.6 GiB text encoder goes there


def choose_device(config: InferenceConfig) -> torch.device:
    """The device that `device` names; "auto" is the first GPU if there is one. Raises InputError if it is not there."""
    if config.device == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return _require_device("device", config.device)


def choose_vae_device(config: InferenceConfig, device: torch.device) -> torch.device:
    """The device that `vae_device` names; "auto" is that of the run. Raises InputError if it is not there."""
    return device if config.vae_device == "auto" else _require_device("vae_device", config.vae_device)


def _require_device(key: str, name: str) -> torch.device:
    device = torch.device(name)
    counts = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
        "xpu": torch.xpu.device_count(),
    }
    count = counts[device.type]
    if (device.index or 0) >= count:
        raise InputError(
            f"{key}: {name!r} asked for, but PyTorch finds {count} {device.type} devices here; "
            f"use {key}=auto or {key}=cpu"
        )
    return device


def choose_dtype(config: InferenceConfig, device: torch.device) -> torch.dtype:
    """Of weights and activations; with FP8 it is that of everything but the transformer's products."""
    if config.precision == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return torch.float32 if config.precision == "fp32" else torch.bfloat16


def model_config_file(config: InferenceConfig) -> Path:
    """The file with the transformer's sizes, of Wan's layout or of Diffusers'."""
    native, diffusers = (config.model_folder / part / "config.json" for part in (".", "transformer"))
    return diffusers if exists(diffusers, "model_name") and not exists(native, "model_name") else native


def needed_files(config: InferenceConfig) -> dict[Path, str]:
    """Every file (or folder of shards) that the run will open, whether it is there or not, and its setting."""
    settings: dict[str, Path | None] = {
        "generator_ckpt": config.generator_path,
        **{lora.setting: lora.path for lora in config.lora_files},
        "decoder": config.preview_path,
        "dummy_forcing.roles": _roles_path(config),
        "dummy_forcing.calibration": calibration_path(config),
    }
    of_the_model = [model_config_file(config), config.text_encoder_path, config.tokenizer_path / "tokenizer.json"]
    if needs_vae(config):
        of_the_model.insert(1, config.vae_path)
    named = dict.fromkeys(of_the_model, "model_name")
    named.update({path: setting for setting, path in settings.items() if path is not None and path not in named})
    return named


def needs_vae(config: InferenceConfig) -> bool:
    """Whether the run opens the VAE: to decode, or to encode what it starts from, which a preview decoder cannot."""
    return config.preview_path is None or config.start_from is not None


def _roles_path(config: InferenceConfig) -> Path | None:
    forcing = config.dummy_forcing
    return Path(forcing.roles) if forcing.enabled and forcing.roles is not None else None


def calibration_path(config: InferenceConfig) -> Path | None:
    forcing = config.dummy_forcing
    if not forcing.enabled or forcing.online or forcing.calibration is None:
        return None
    return Path(forcing.calibration)


def require_files(config: InferenceConfig) -> None:
    """Raises InputError that names every missing file and how to get it."""
    check_published_sizes(config)
    require_readable(config)
    by_hint: dict[str, list[str]] = {}
    own_hints = {
        "dummy_forcing.roles": "dummy_forcing.roles: give a roles file or remove the key.",
        "dummy_forcing.calibration": "dummy_forcing.calibration: make it with python -m pipeline.calibrate --out FILE.",
        "decoder": f"decoder: {SOURCE_HINT} decoder=wan does without.",
    }
    missing = {path: setting for path, setting in needed_files(config).items() if not exists(path, setting)}
    for path, setting in missing.items():
        hint = own_hints.get(setting) or download_hint(path)
        by_hint.setdefault(hint, []).append(f"{setting}: {shown(path)} does not exist.")
    if by_hint:
        lines = [line for hint, lines in by_hint.items() for line in (*lines, hint)]
        raise InputError("\n".join(lines) + relative_hint(*missing).replace(" ", "\n", 1))


def require_readable(config: InferenceConfig) -> None:
    """Raises InputError for a file or folder that is there and cannot be read."""
    for path, setting in needed_files(config).items():
        if is_folder(path, setting):
            require_folder(path, setting)  # which of its files is wanted is the loader's business
        elif exists(path, setting):
            require_file(path, setting)


def published_sizes(config: InferenceConfig) -> ModelConfig | None:
    """The sizes that the name of the model's folder promises, if it is that of a published one."""
    backbone = backbone_of(config.model_name)
    return None if backbone is None else backbone.sizes


def check_published_sizes(config: InferenceConfig) -> None:
    """What no model of that name can have is told before its files are asked for. Raises InputError."""
    sizes = published_sizes(config)
    if sizes is not None and not exists(model_config_file(config), "model_name"):
        check_against_model(config, sizes)


def check_before_loading(config: InferenceConfig, device: torch.device) -> tuple[ModelConfig, GeneratorSettings]:
    """The model's sizes and the loop's settings, once all is found to go together.

    Transformer, decoder and encoder are assembled from names and shapes alone, so that a file that does not fit is
    found in seconds, not after the minutes that the text encoder takes. Raises InputError.
    """
    sizes = model_sizes(config)
    settings = generator_settings(config, sizes)
    warn_of_another_schedule(config)
    dtype = choose_dtype(config, device)
    attention_backend(config.attention, device, dtype)
    ragged_backend(config.attention, device, dtype)
    check_engine(config.engine, device)
    choose_vae_device(config, device)
    if config.precision == "fp8":
        check_fp8(device)
    _assemble(config, sizes, META, dtype)
    if settings.policy.dial is not None and settings.policy.online is None:
        compare_checkpoints(config, settings.policy.dial.calibration)
    load_encoder(config, load_decoder(config, META, dtype))
    _check_text_encoder(config, sizes, dtype)
    return sizes, settings


def _check_text_encoder(config: InferenceConfig, sizes: ModelConfig, dtype: torch.dtype) -> None:
    """Raises InputError if the text encoder's names and shapes do not fit, or not the transformer."""
    source = config.text_encoder_path
    try:
        encoder = TextEncoder.load(source, config.tokenizer_path, dtype, META, sizes.text_len)
    except TooLarge as error:  # a dry run may be on another machine than the run
        logger.warning("%s It is not checked.", error)
        return
    if encoder.width != sizes.text_dim:
        raise InputError(
            f"{shown(source)} makes embeddings of {encoder.width} numbers and the transformer takes {sizes.text_dim} "
            f"(text_dim of its config.json): they do not belong together. {download_hint(source)}"
        )


def text_encoder_place(config: InferenceConfig, device: torch.device) -> torch.device:
    """Where the text encoder runs: "auto" is the run's device unless that is a GPU with too little free memory, or
    memory is to be saved."""
    if config.text_encoder_device != "auto":
        return device if config.text_encoder_device == "device" else torch.device("cpu")
    if config.low_memory is True:
        return torch.device("cpu")
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < TEXT_ENCODER_HEADROOM:
        logger.info("text encoder: on the CPU, since %s has less than 12 GiB free", device)
        return torch.device("cpu")
    return device


def model_sizes(config: InferenceConfig) -> ModelConfig:
    """The transformer's sizes, from the `config.json` of the model folder; what depends on them is checked."""
    sizes = ModelConfig.from_mapping(
        read_model_config(config.model_folder), f"{shown(config.model_folder)}/config.json"
    )
    check_against_model(config, sizes)
    return sizes


def load_transformer(
    config: InferenceConfig,
    sizes: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    checked: bool = False,
    mesh: DeviceMesh | None = None,
) -> CausalWanModel:
    """The causal transformer with its LoRA merged; `checked`: what there is to warn of, `check_before_loading` has.
    With a `mesh` its layers are sharded over it."""
    model = _assemble(config, sizes, device, dtype, logger.debug if checked else logger.warning, mesh)
    model.use_attention(config.attention)
    if config.precision == "fp8":
        to_fp8(model)
    return model


def _assemble(
    config: InferenceConfig,
    sizes: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    warn: Callable[[str], None] = logger.warning,
    mesh: DeviceMesh | None = None,
) -> CausalWanModel:
    """On the meta device nothing of the files is read but names and shapes, and those are checked all the same."""
    source = config.generator_path
    state = read_sized_generator(config, sizes)
    if device == META:
        state = {name: tensor.to(META) for name, tensor in state.items()}
    for lora in config.lora_files:
        adapter, factors = lora.adapter or AdapterConfig(), read_tensors(lora.path)
        merged = merge_lora(state, factors, adapter.rank, adapter.alpha, lora.path, lora.strength, warn)
        if device != META:
            logger.info("LoRA: %s merged into %d layers, times %g", shown(lora.path), merged, lora.strength)
    with torch.device("meta"):
        model = CausalWanModel(sizes)
    if mesh is None:
        load_into(model, state, source, dtype, device, consume=True)
    else:
        load_sharded(model, state, source, dtype, device, mesh)
    return model.eval()


def read_sized_generator(config: InferenceConfig, sizes: ModelConfig) -> dict[str, Tensor]:
    """The generator's tensors, mapped into memory. Raises InputError where they are not of these sizes."""
    state = read_generator(config.generator_path, config.use_ema)
    require_sizes(state, sizes, config.generator_path, f"{shown(config.model_folder)}/config.json")
    return state


def load_vae(config: InferenceConfig, device: torch.device, dtype: torch.dtype) -> VAE:
    return VAE.load(config.vae_path, dtype, device)


def load_decoder(config: InferenceConfig, device: torch.device, dtype: torch.dtype) -> LatentDecoder:
    """What decodes the videos: the VAE, or the preview decoder that the configuration names."""
    if config.preview_path is None:
        return load_vae(config, device, dtype)
    return PreviewDecoder.load(config.preview_path, dtype, device)


def load_encoder(config: InferenceConfig, decoder: LatentDecoder) -> VAE | None:
    """What encodes that from which videos start: the decoder if it is the VAE. None where nothing is to be encoded."""
    if isinstance(decoder, VAE):
        return decoder
    return load_vae(config, decoder.device, decoder.dtype) if needs_vae(config) else None


def require_heads(config: InferenceConfig, sizes: ModelConfig, ranks: int) -> None:
    """Raises InputError for more processes than a layer has heads."""
    if ranks > sizes.num_heads:
        raise InputError(
            f"parallel: {config.parallel} with {ranks} processes, but a layer has {sizes.num_heads} heads; use "
            f"{sizes.num_heads} processes or fewer"
        )


def generator_settings(config: InferenceConfig, sizes: ModelConfig) -> GeneratorSettings:
    """The loop's settings; reads the file of roles or of a calibration if there is one. Raises InputError."""
    forcing = config.dummy_forcing
    roles = None
    dial, path = None, calibration_path(config)
    if path is not None:
        dial = load_dial(config, sizes, path)
    elif forcing.online:
        dial = online_dial(config, sizes)
    if forcing.enabled and forcing.roles is not None:
        roles = HeadRoles.load(Path(forcing.roles), sizes.num_layers, sizes.num_heads)
    window, block = config.model_kwargs.local_attn_size, config.num_frame_per_block
    policy = policy_from_config(config.model_kwargs, forcing, block, roles, dial, sizes)
    rolling = None if config.rolling is None else config.rolling.max_attention
    first = config.denoising_step_list_first_chunk or config.first_frame_denoising_step_list
    return GeneratorSettings(
        schedule=_schedule(config, config.denoising_step_list),
        policy=policy if rolling is None else policy.at_most(block, rolling - block),
        context_noise=float(config.context_noise),
        window=None if window == -1 else window,
        relative_rope=config.rope == "relative",
        global_sink=config.global_sink,
        reclassify_on_switch=forcing.enabled and forcing.reclassify_on_switch,
        teacache_threshold=forcing.teacache_threshold if forcing.enabled and forcing.teacache_enabled else None,
        first_schedule=None if first is None else _schedule(config, first),
        first_at_zero=config.first_frame_denoising_step_list is not None,
        rope_window=config.rope_window,
        kv_flush=config.kv_flush,
        cut_from=config.scene_cut_from,
        rolling=rolling,
    )


def _schedule(config: InferenceConfig, steps: Sequence[int]) -> DenoisingSchedule:
    return DenoisingSchedule.build(steps, config.model_kwargs.timestep_shift, config.warp_denoising_step)
