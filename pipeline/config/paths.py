"""Where the files of a model lie: one root, one folder a repository, absolute paths as they are.

Nothing is opened here, and a path that leads nowhere is returned all the same: the loader that needs the file says
what is missing. Knows the file names of Wan's own repositories and of their Diffusers conversions.
"""

from __future__ import annotations

import os
from pathlib import Path

from utils.errors import InputError

ROOT_VARIABLE = "DUMMY_FORCING_ROOT"
DEFAULT_ROOT = "checkpoints"


def default_model_root() -> str:
    """The environment's `DUMMY_FORCING_ROOT`, or `checkpoints`."""
    return os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT


def resolve_path(value: str, model_root: str, field: str) -> Path:
    """An absolute path as it is; a relative one from the current folder where that exists, else under the root.

    Raises:
        InputError: an empty path; `field` names the setting.
    """
    if not value.strip():
        raise InputError(f"{field}: the path is empty; give a path, absolute or relative to {model_root}")
    path = Path(value).expanduser()
    if path.is_absolute() or path.exists():
        return path
    return Path(model_root).expanduser() / path


def vae_path(model_folder: Path) -> Path:
    """`Wan2.1_VAE.pth`, or the folder `vae/` of the Diffusers layout."""
    return _native_or_diffusers(model_folder, "Wan2.1_VAE.pth", "vae")


def preview_path(decoder: str, model_root: str) -> Path | None:
    """The file that the setting `decoder` names, `taehv:FILE`; None for `wan`. Raises InputError for anything else."""
    kind, _, name = decoder.partition(":")
    if decoder == "wan":
        return None
    if kind != "taehv":
        raise InputError(f"decoder: must be wan or taehv:FILE (such as taehv:taew2_1.pth), got {decoder!r}")
    return resolve_path(name, model_root, "decoder: taehv")


def text_encoder_path(model_folder: Path) -> Path:
    """`models_t5_umt5-xxl-enc-bf16.pth`, or the folder `text_encoder/` of the Diffusers layout."""
    return _native_or_diffusers(model_folder, "models_t5_umt5-xxl-enc-bf16.pth", "text_encoder")


def tokenizer_path(model_folder: Path) -> Path:
    """The folder `google/umt5-xxl/`, or `tokenizer/` of the Diffusers layout."""
    return _native_or_diffusers(model_folder, "google/umt5-xxl", "tokenizer")


def _native_or_diffusers(model_folder: Path, native: str, diffusers: str) -> Path:
    native_path = model_folder / native
    if not native_path.exists() and (model_folder / diffusers).is_dir():
        return model_folder / diffusers
    return native_path
