"""Parts of finished models, as `shapes.export` has written them.

`option` is the one that has named the folder, for what an InputError says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shapes.dit import CONFIG_FILE, TEXT_ENCODER_FILE, TRANSFORMER_FILE, VAE_FILE, Flow, TextEncoder
from shapes.native_vae import native_vae
from shapes.runs import load
from shapes.tokenizer import TOKENIZER
from shapes.vae import build_vae
from utils.errors import InputError
from utils.user_paths import read_json, require_file
from wan.checkpoints.text_names import to_transformers


def finished_text_encoder(folder: Path, option: str) -> TextEncoder:
    """Raises InputError."""
    path, encoder = _part(folder, TEXT_ENCODER_FILE, option, "text encoder"), TextEncoder()
    words = folder / TOKENIZER / "tokenizer.json"
    if read_json(words, option, "tokenizer of a finished model") != json.loads(encoder.tokenizer.to_str()):
        raise InputError(f"{option}: {words} has other words than captions have now; train the text encoder anew")
    try:
        encoder.umt5.load_state_dict({name: value.float() for name, value in to_transformers(load(path)).items()})
    except (RuntimeError, AttributeError) as error:
        raise InputError(f"{option}: {path} is of another model; give one that shapes.train has written") from error
    return encoder


def finished_transformer(folder: Path, option: str) -> dict[str, Tensor]:
    """Its weights in single precision. Raises InputError."""
    path = _part(folder, TRANSFORMER_FILE, option, "transformer")
    try:
        weights: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise InputError(f"{option}: {path} is damaged ({error}); give a finished model's folder") from error
    sizes = {name: value.shape for name, value in Flow().model.state_dict().items()}
    if {name: value.shape for name, value in weights.items()} != sizes:
        raise InputError(f"{option}: {path} is of another model; give a folder that shapes.train export has written")
    return {name: value.float() for name, value in weights.items()}


def finished_vae(folder: Path, option: str) -> dict[str, Tensor]:
    """Its weights under the names of Wan2.1_VAE.pth. Raises InputError."""
    path = _part(folder, VAE_FILE, option, "VAE")
    weights, expected = load(path), native_vae(build_vae())
    if {name: getattr(value, "shape", None) for name, value in weights.items()} != {
        name: value.shape for name, value in expected.items()
    }:
        raise InputError(f"{option}: {path} is of another model; give a folder that shapes.train export has written")
    return cast("dict[str, Tensor]", weights)


def _part(folder: Path, name: str, option: str, what: str) -> Path:
    """Where it is; a folder without config.json has parts of two models, see `shapes.export`."""
    for file, said in ((name, what), (CONFIG_FILE, "description")):
        require_file(folder / file, option, f"{said} of a finished model")
    return folder / name
