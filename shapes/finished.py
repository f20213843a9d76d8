"""What a finished model is, as `shapes.export` writes it, and its parts.

`option` is the one that has named the folder, for what an InputError says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shapes.dit import CONFIG_FILE, SIZES, TEXT_ENCODER_FILE, TRANSFORMER_FILE, VAE_FILE, Flow, TextEncoder
from shapes.native import native_text_encoder, native_vae
from shapes.runs import fitting, told, unpickled
from shapes.tokenizer import TOKENIZER
from shapes.vae import build_vae
from utils.errors import InputError
from utils.user_paths import read_json, require_file
from wan.checkpoints.filling import require_finite
from wan.checkpoints.text_names import to_transformers

REMEDY = "give a folder that shapes.train export has written"


def description() -> str:
    """Its config.json."""
    kind = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "model_type": "t2v"}
    sizes = {name: value for name, value in asdict(SIZES).items() if name != "patch_size"}
    return json.dumps(kind | sizes, indent=2) + "\n"


def finished_text_encoder(folder: Path, option: str) -> TextEncoder:
    """Raises InputError."""
    path, encoder = _part(folder, TEXT_ENCODER_FILE, option, "text encoder"), TextEncoder()
    words = folder / TOKENIZER / "tokenizer.json"
    if read_json(words, option, "tokenizer of a finished model") != json.loads(encoder.tokenizer.to_str()):
        raise InputError(f"{option}: {words} has other words than captions have now; train the text encoder anew")
    weights = _weights(path, option, unpickled, native_text_encoder(encoder.umt5))
    encoder.umt5.load_state_dict(to_transformers(weights))
    return encoder


def finished_transformer(folder: Path, option: str) -> dict[str, Tensor]:
    """Its weights in single precision. Raises InputError."""
    path = _part(folder, TRANSFORMER_FILE, option, "transformer")
    return _weights(path, option, load_file, Flow().model.state_dict())


def finished_vae(folder: Path, option: str) -> dict[str, Tensor]:
    """Its weights in single precision, under the names of Wan2.1_VAE.pth. Raises InputError."""
    return vae_weights(_part(folder, VAE_FILE, option, "VAE"), option)


def vae_weights(path: Path, option: str) -> dict[str, Tensor]:
    """The same of a folder that may have nothing else."""
    return _weights(path, option, unpickled, native_vae(build_vae()))


def _part(folder: Path, name: str, option: str, what: str) -> Path:
    """Where it is; a folder without config.json has parts of two models, see `shapes.export`."""
    require_file(folder / name, option, f"{what} of a finished model")
    said = read_json(folder / CONFIG_FILE, option, "description of a finished model")
    if said != json.loads(description()):
        raise InputError(f"{option}: {folder / CONFIG_FILE} is of another model; {REMEDY}")
    return folder / name


def _weights(
    path: Path, option: str, read: Callable[[Path], Mapping[str, object]], expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    try:
        found = fitting(read(path), expected)
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{option}: {path} is damaged{told(error)}; {REMEDY}") from error
    if found is None:
        raise InputError(f"{option}: {path} is of another model; {REMEDY}")
    for name, value in found.items():
        require_finite(value, name, path)
    return {name: value.float() for name, value in found.items()}
