"""What a training takes over from the finished model whose transformer it begins with: all that this one has learnt by.

The text encoder has been trained once, and would come out otherwise. The linear code is fitted to the world's films,
and would come out otherwise where the world's laws have changed; so it is read off the VAE that learnt it.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from shapes.data import BLOCK, as_video, make_clip, pixel_frame
from shapes.dit import TEXT_ENCODER_FILE, VAE_FILE, TextEncoder
from shapes.finished import finished_text_encoder, finished_vae
from shapes.linear import LinearCode, patches
from shapes.runs import Stage, averaged, save
from shapes.vae import FIT_SEED, linear_code_file
from utils.errors import InputError
from wan.vae.vae import VAE

OPTION = "--start-from"
CLIPS = 40  # by which a VAE shows its code: it comes out to a mean square of 0.004, where latents have 1
SWITCH, FRAMES = 2 * BLOCK, 4 * BLOCK  # of each, in latent frames

logger = logging.getLogger(__name__)


def adopt_text_encoder(folder: Path, finished: Path) -> None:
    """`folder` gets the encoder of a model that `shapes.export` has written, by which that model's transformer has
    learnt. Raises InputError, also if `folder` has another one."""
    state = Stage(folder, "text", 0).path
    encoder = finished_text_encoder(finished, OPTION)
    if not state.exists():
        save({"average": dict(encoder.named_parameters())}, state)
    pairs = zip(averaged(state, TextEncoder()).parameters(), encoder.parameters(), strict=True)
    if not all(torch.equal(here.bfloat16(), there.bfloat16()) for here, there in pairs):  # as it is exported
        path = finished / TEXT_ENCODER_FILE
        raise InputError(f"{OPTION}: {state} is another text encoder than {path}; give another --work")


def adopt_linear_code(folder: Path, finished: Path, clips: int = CLIPS) -> None:
    """`folder` gets the code by which the VAE of a finished model encodes, unless it has one. Raises InputError."""
    path = linear_code_file(folder)
    if path.exists():
        return
    weights = finished_vae(finished, OPTION)
    code_of(VAE.from_state(weights, None, torch.float32, "cpu", finished / VAE_FILE), clips).save(path)
    logger.info("linear code: read off the VAE in %s", finished)


def code_of(vae: VAE, clips: int) -> LinearCode:
    """The linear code that is nearest to what a VAE encodes of so many clips."""
    seen: list[Tensor] = []
    latents: list[Tensor] = []
    for index in range(clips):
        video = as_video(make_clip(FIT_SEED, index, (SWITCH,), pixel_frame(FRAMES), held=None).video)[None]
        seen.append(patches(video).flatten(0, 3))
        latents.append(vae.encode(video).permute(0, 1, 3, 4, 2).flatten(0, 3))
    return LinearCode.nearest(torch.cat(seen), torch.cat(latents))
