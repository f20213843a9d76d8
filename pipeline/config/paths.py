"""Where the files of a model lie: one root, one folder a repository, absolute paths as they are.

Nothing is opened here, and a path that leads nowhere is returned all the same: the loader that needs the file says
what is missing. Knows the file names of Wan's own repositories and of their Diffusers conversions, and which settings
are paths.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.errors import InputError, quoted
from utils.user_paths import exists, require_searchable, user_path

REQUIRED = ("data_path", "output_folder", "model_name", "model_root")
OPTIONAL = (
    *("extended_prompt_path", "generator_ckpt", "lora_ckpt", "vae_ckpt", "text_encoder_ckpt"),
    *("compile_cache", "start_from", "roles", "calibration"),
)
EMPTY_IS_NULL = ("extended_prompt_path", "lora_ckpt")  # so files of neighbours write it
PREVIEW = "taehv"

# The same weights as their publishers call them: Wan-AI first, then the conversions for ComfyUI.
VAE_NAMES = (
    "Wan2.1_VAE.pth",
    *("Wan2.1_VAE.safetensors", "Wan2_1_VAE_fp32.safetensors", "Wan2_1_VAE_bf16.safetensors"),
    *("wan_2.1_vae.safetensors", "Wan2_1_VAE.safetensors", "Wan2.1_VAE.pt"),
)
TEXT_ENCODER_NAMES = (
    "models_t5_umt5-xxl-enc-bf16.pth",
    *("models_t5_umt5-xxl-enc-bf16.safetensors", "umt5-xxl-enc-bf16.safetensors", "umt5-xxl-enc-bf16.pth"),
    *("umt5_xxl_fp16.safetensors", "umt5-xxl-enc-fp8_e4m3fn.safetensors", "umt5_xxl_fp8_e4m3fn_scaled.safetensors"),
    *("models_t5_umt5-xxl-enc-bf16.pt", "umt5_xxl_fp16.pth"),
)
ROOT_VARIABLE = "DUMMY_FORCING_ROOT"
DEFAULT_ROOT = "checkpoints"


def default_model_root() -> str:
    """The environment's `DUMMY_FORCING_ROOT`, or `checkpoints`."""
    return os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT


def expand_paths(settings: Mapping[str, object]) -> dict[str, object]:
    """The settings with `~` expanded in all that are paths; those that may be null are null where they are empty.

    Raises InputError for what cannot be a path.
    """
    expanded = {key: _expanded(key, value, key) for key, value in settings.items()}
    forcing = settings.get("dummy_forcing")
    if isinstance(forcing, Mapping):
        expanded["dummy_forcing"] = {
            key: _expanded(key, value, f"dummy_forcing.{key}") for key, value in forcing.items()
        }
    loras = settings.get("loras")
    if isinstance(loras, Sequence) and not isinstance(loras, str):
        expanded["loras"] = [_expanded_lora(lora, f"loras[{index}].path") for index, lora in enumerate(loras)]
    decoder = settings.get("decoder")
    if isinstance(decoder, str) and decoder.startswith(f"{PREVIEW}:"):
        expanded["decoder"] = f"{PREVIEW}:{user_path(decoder.removeprefix(f'{PREVIEW}:'), f'decoder: {PREVIEW}')}"
    return expanded


def _expanded_lora(lora: object, setting: str) -> object:
    if not isinstance(lora, Mapping) or not isinstance(lora.get("path"), str):
        return lora  # reported when the dataclass is built
    return {**lora, "path": str(user_path(lora["path"], setting))}


def _expanded(key: str, value: object, setting: str) -> object:
    if key not in (*REQUIRED, *OPTIONAL) or not isinstance(value, str):
        return value  # a path of another type is reported when the dataclass is built
    if key in OPTIONAL and value.lower() == "none":
        return None
    if key in EMPTY_IS_NULL and not value.strip():
        return None
    return str(user_path(value, setting))


def resolve_path(value: str, model_root: str, field: str) -> Path:
    """An absolute path as it is; a relative one from the current folder where that exists, else under the root.

    Raises:
        InputError: an empty path, or one that the system does not look up; `field` names the setting.
    """
    path = user_path(value, field)
    if path.is_absolute() or exists(path, field):
        return path
    root = user_path(model_root, "model_root")
    require_searchable(root, "model_root")
    return root / path


def vae_path(model_folder: Path, given: str | None, model_root: str) -> Path:
    """The VAE's file or folder that `vae_ckpt` gives, else the first of its usual ones that is there."""
    if given is not None:
        return resolve_path(given, model_root, "vae_ckpt")
    return _native_or_diffusers(model_folder, VAE_NAMES, "vae")


def preview_path(decoder: str, model_root: str) -> Path | None:
    """The file that the setting `decoder` names, `taehv:FILE`; None for `wan`. Raises InputError for anything else."""
    kind, _, name = decoder.partition(":")
    if decoder == "wan":
        return None
    if kind != PREVIEW:
        raise InputError(f"decoder: must be wan or taehv:FILE (such as taehv:taew2_1.pth), got {quoted(decoder)}")
    return resolve_path(name, model_root, f"decoder: {PREVIEW}")


def text_encoder_path(model_folder: Path, given: str | None, model_root: str) -> Path:
    """The text encoder's file or folder that `text_encoder_ckpt` gives, else the first of its usual ones there is."""
    if given is not None:
        return resolve_path(given, model_root, "text_encoder_ckpt")
    return _native_or_diffusers(model_folder, TEXT_ENCODER_NAMES, "text_encoder")


def tokenizer_path(model_folder: Path) -> Path:
    """The folder `google/umt5-xxl/`, or `tokenizer/` of the Diffusers layout."""
    return _native_or_diffusers(model_folder, ("google/umt5-xxl",), "tokenizer")


def _native_or_diffusers(model_folder: Path, native: Sequence[str], diffusers: str) -> Path:
    """The first there is of the native names and the folder of the Diffusers layout; else the first native one."""
    choices = [*(model_folder / name for name in native), model_folder / diffusers]
    return next((path for path in choices if exists(path, "model_name")), choices[0])
