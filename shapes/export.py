"""Trained states to a checkpoint folder in the layout of Wan-AI/Wan2.1-T2V-1.3B, half precision."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar, cast

from safetensors.torch import save as serialized
from torch import Tensor, nn

from shapes.dit import CONFIG_FILE, SIZES, TEXT_ENCODER_FILE, TRANSFORMER_FILE, VAE_FILE, Flow, TextEncoder
from shapes.native_vae import native_vae
from shapes.reading import trained_text_encoder
from shapes.runs import averaged_of, check_text, command_of, fingerprint, load, save, unfinished
from shapes.tokenizer import TOKENIZER, write_tokenizer
from shapes.vae import build_vae
from utils.files import ensure_writable_folder, write_atomic
from wan.checkpoints.text_names import WAN_IN_BLOCK, WAN_TOP_LEVEL

logger = logging.getLogger(__name__)

Module = TypeVar("Module", bound=nn.Module)

MODEL = "Wan2.1-T2V-shapes"


def export(work: Path, folder: Path) -> Path:
    """Write `folder`/Wan2.1-T2V-shapes from the states in `work`; returns it.

    Where no VAE has been trained in `work` the one in the folder stays: the linear code, towards which every VAE is
    trained, is the same. A training that is under way may be looked at so, which the log says. Raises InputError,
    before anything is written, if a state is missing, or the transformer has not learnt by this text encoder.
    """
    text = trained_text_encoder(work)
    flow = _trained(work / "dit.pt", Flow(), text)
    stays = (folder / MODEL / VAE_FILE).is_file() and not (work / "vae.pt").exists()
    vae = None if stays else native_vae(_trained(work / "vae.pt", build_vae()))
    return write_model(folder, text, flow.model.state_dict(), vae)


def write_model(
    folder: Path, text: TextEncoder, transformer: Mapping[str, Tensor], vae: Mapping[str, Tensor] | None
) -> Path:
    """Write `folder`/Wan2.1-T2V-shapes, but for its VAE if there is none; returns it.

    Without config.json, the first to go and the last to be written, the folder is no model: so none is left of two
    halves. Raises InputError if it cannot be written.
    """
    target = folder / MODEL
    ensure_writable_folder(target / TOKENIZER, "--out")
    (target / CONFIG_FILE).unlink(missing_ok=True)
    write_tokenizer(target / TOKENIZER)
    _write_text_encoder(text, target)
    if vae is not None:
        save(_halved(vae), target / VAE_FILE)
    write_atomic(target / TRANSFORMER_FILE, serialized(_halved(transformer)))
    _write_config(target)
    return target


def _trained(path: Path, module: Module, text: TextEncoder | None = None) -> Module:
    """`module` with the averaged weights of a stage that may have learnt by `text`. Raises InputError."""
    state = load(path)
    if text is not None:
        check_text(state, path, fingerprint(text))
    if (missing := unfinished(state)) is not None:
        logger.warning("%s: %s; %s goes on", path, missing, command_of(path))
    return cast(Module, averaged_of(state, path, module))


def _write_config(target: Path) -> None:
    config = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "model_type": "t2v"}
    sizes = {name: value for name, value in asdict(SIZES).items() if name != "patch_size"}
    write_atomic(target / CONFIG_FILE, json.dumps(config | sizes, indent=2) + "\n")


def _write_text_encoder(text: TextEncoder, target: Path) -> None:
    state = {name: value.bfloat16() for name, value in wan_text_names(text.umt5.state_dict()).items()}
    save(state, target / TEXT_ENCODER_FILE)


def _halved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().half().contiguous() for name, value in state.items()}


def wan_text_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """UMT5EncoderModel's tensors under Wan's names, the embedding once."""
    top = {theirs: ours for ours, theirs in WAN_TOP_LEVEL.items()}
    within = {theirs: ours for ours, theirs in WAN_IN_BLOCK.items()}
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        stem = name.rpartition(".")[0]
        if name.startswith("encoder.block."):
            number, rest = stem.removeprefix("encoder.block.").split(".", 1)
            renamed[f"blocks.{number}.{within[rest]}.weight"] = value
        elif stem in top:
            renamed[f"{top[stem]}.weight"] = value
    return renamed
