"""Trained states to a checkpoint folder in the layout of Wan-AI/Wan2.1-T2V-1.3B, half precision."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar, cast

import torch
from safetensors.torch import save as safetensors_of
from torch import Tensor, nn

from shapes.dit import CONFIG_FILE, TEXT_ENCODER_FILE, TRANSFORMER_FILE, VAE_FILE, Flow, TextEncoder
from shapes.finished import description, vae_weights
from shapes.native import native_text_encoder, native_vae
from shapes.reading import trained_text_encoder
from shapes.runs import averaged_of, check_text, command_of, fingerprint, load, serialised, unfinished
from shapes.tokenizer import TOKENIZER, tokenizer_files
from shapes.vae import build_vae
from utils.files import ensure_writable_folder, remove_stale_partials, write_together
from utils.lock import RunLock
from wan.checkpoints.filling import require_finite

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
    there = folder / MODEL / VAE_FILE
    if there.is_file() and not (work / "vae.pt").exists():
        vae = vae_weights(there, "--out")
    else:
        vae = native_vae(_trained(work / "vae.pt", build_vae()))
    return write_model(folder, text, flow.model.state_dict(), vae)


def write_model(folder: Path, text: TextEncoder, transformer: Mapping[str, Tensor], vae: Mapping[str, Tensor]) -> Path:
    """Write `folder`/Wan2.1-T2V-shapes; returns it.

    Without config.json, the first to go and the last to be written, the folder is no model: so none is left of two
    halves. Raises InputError if weights are no numbers, or cannot be written; a model that is there stays then.
    """
    target = folder / MODEL
    words = {target / TOKENIZER / name: content for name, content in tokenizer_files().items()}
    contents: dict[Path, str | bytes] = {
        **words,
        target / TEXT_ENCODER_FILE: serialised(_as(torch.bfloat16, native_text_encoder(text.umt5), target)),
        target / VAE_FILE: serialised(_as(torch.float16, vae, target)),
        target / TRANSFORMER_FILE: safetensors_of(_as(torch.float16, transformer, target)),
        target / CONFIG_FILE: description(),
    }
    ensure_writable_folder(target / TOKENIZER, "--out")
    busy = f"--out: another run writes {target}; wait for its end, or give another folder."
    with RunLock(target / ".model.lock", busy) as lock:
        lock.begin(f"process {os.getpid()}")
        for written in (target, target / TOKENIZER):
            remove_stale_partials(written)
        write_together(contents)
    return target


def _trained(path: Path, module: Module, text: TextEncoder | None = None) -> Module:
    """`module` with the averaged weights of a stage that may have learnt by `text`. Raises InputError."""
    state = load(path)
    if text is not None:
        check_text(state, path, fingerprint(text))
    if (missing := unfinished(state)) is not None:
        logger.warning("%s: %s; %s goes on", path, missing, command_of(path))
    return cast(Module, averaged_of(state, path, module))


def _as(dtype: torch.dtype, weights: Mapping[str, Tensor], target: Path) -> dict[str, Tensor]:
    found = {name: value.detach().to(dtype).contiguous() for name, value in weights.items()}
    for name, value in found.items():
        require_finite(value, name, target)
    return found
