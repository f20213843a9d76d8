"""Training of the small VAE: Diffusers' AutoencoderKLWan of width 8, towards the linear code.

The encoder regresses the whitened principal components of `shapes.linear`, the decoder draws the video from them
(with a little noise, as a transformer's latents have). Trained from nothing as an autoencoder it stays grey for long;
with the target given it is not. Both see crops as videos of their own, whole in two calls of the module: the first
frame, then the rest, which equals the frame-by-frame way of `wan.vae` to 3e-6.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from shapes.data import as_video, make_clip
from shapes.linear import LinearCode, patches
from shapes.optim import Average, Optimizers, trapezoid
from shapes.runs import Stage, fast_precision, sizes_of, training_device
from shapes.schedule import noise_like
from shapes.world import FRAMES, HEIGHT, WIDTH

logger = logging.getLogger(__name__)

BASE_WIDTH = 8
FIT_CLIPS = 150  # the linear code is fitted to samples of this many clips
FIRST_FRAME = 4.0  # its weight: it has a latent of its own, and is drawn without a history
NOISE = 0.1  # of the latents that the decoder draws from
FIT_SEED, TRAIN_SEED, CROP_SEED = 11, 12, 13


@dataclass(frozen=True)
class VAERecipe:
    """`crop`: pixel frames, rows, columns of a training sample; the encoder is trained every `encoder_every` steps."""

    steps: int = 2000
    batch: int = 2
    crop: tuple[int, int, int] = (17, 48, 64)
    encoder_every: int = 2
    muon_lr: float = 0.01
    adam_lr: float = 1e-3
    cool_down: float = 0.6
    compile: bool = True


def build_vae() -> nn.Module:
    from diffusers import AutoencoderKLWan

    return cast("Callable[..., nn.Module]", AutoencoderKLWan)(base_dim=BASE_WIDTH)


def linear_code_file(folder: Path) -> Path:
    return folder / "linear.pt"


def fit_linear_code(folder: Path, clips: int = FIT_CLIPS) -> LinearCode:
    """The code in `folder`, fitted now if it is not there."""
    path = linear_code_file(folder)
    if not path.exists():
        generator = torch.Generator().manual_seed(FIT_SEED)
        samples = []
        for index in range(clips):
            every = patches(as_video(make_clip(FIT_SEED, index).video)[None]).flatten(0, 3)
            samples.append(every[torch.randperm(len(every), generator=generator)[:600]])
        LinearCode.fit(torch.cat(samples)).save(path)
        logger.info("linear code: fitted to %d clips", clips)
    return LinearCode.load(path)


def _empty_cache(part: nn.Module) -> list[Tensor | str | None]:
    """What Diffusers' modules keep between calls: an entry for every causal convolution."""
    return [None] * sum(type(module).__name__ == "WanCausalConv3d" for module in part.modules())


def decode_whole(vae: nn.Module, z: Tensor) -> Tensor:
    """z [B, 16, F, h, w], F > 1, to video [B, 3, 1 + 4·(F - 1), H, W]."""
    decoder = vae.get_submodule("decoder")
    cache = _empty_cache(decoder)
    z = vae.get_submodule("post_quant_conv")(z)
    first = decoder(z[:, :, :1], feat_cache=cache, feat_idx=[0], first_chunk=True)
    return torch.cat((first, decoder(z[:, :, 1:], feat_cache=cache, feat_idx=[0])), dim=2)


def encode_whole(vae: nn.Module, video: Tensor) -> Tensor:
    """Video [B, 3, 1 + 4·k, H, W], k > 0, to the means [B, 16, 1 + k, h, w]."""
    encoder = vae.get_submodule("encoder")
    cache = _empty_cache(encoder)
    first = encoder(video[:, :, :1], feat_cache=cache, feat_idx=[0])
    features = torch.cat((first, encoder(video[:, :, 1:], feat_cache=cache, feat_idx=[0])), dim=2)
    return cast(Tensor, vae.get_submodule("quant_conv")(features))[:, :16]


def crops(step: int, recipe: VAERecipe) -> Tensor:
    """The samples [B, 3, frames, rows, columns] of a step, on the latents' raster."""
    rng = np.random.default_rng((CROP_SEED, step))
    frames, rows, columns = recipe.crop
    samples = []
    for item in range(recipe.batch):
        clip = make_clip(TRAIN_SEED, step * recipe.batch + item, (9,) if rng.random() < 0.5 else (), held=None)
        first = 4 * int(rng.integers((FRAMES - frames) // 4 + 1))
        top, left = 8 * int(rng.integers((HEIGHT - rows) // 8 + 1)), 8 * int(rng.integers((WIDTH - columns) // 8 + 1))
        part = clip.video[first : first + frames, top : top + rows, left : left + columns]
        samples.append(as_video(np.ascontiguousarray(part)))
    return torch.stack(samples).transpose(1, 2)


class _Losses(nn.Module):
    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def decoder(self, z: Tensor, video: Tensor) -> Tensor:
        off = decode_whole(self.vae, z).float() - video
        error = (off.abs() + 2 * off.square()).mean((0, 1, 3, 4))
        weights = torch.ones_like(error)
        weights[0] = FIRST_FRAME
        return (weights * error).sum() / weights.sum()

    def encoder(self, video: Tensor, z: Tensor) -> Tensor:
        return (encode_whole(self.vae, video).float() - z).square().mean()


def train_vae(folder: Path, recipe: VAERecipe, until: int | None = None) -> nn.Module:
    """Train, or go on training; returns the module with averaged weights."""
    torch.manual_seed(TRAIN_SEED)
    device = training_device()
    code, vae = fit_linear_code(folder), build_vae().to(device)
    stage = Stage(folder, "vae", recipe.steps, until, sizes=sizes_of(recipe))
    named = dict(vae.named_parameters())
    matrices = [p for p in named.values() if p.ndim > 1 and min(p.shape[:2]) > 3]
    rest = [p for p in named.values() if not any(p is other for other in matrices)]
    optimizers = Optimizers(matrices, rest, recipe.muon_lr, recipe.adam_lr)
    average = Average(named, 0.995)
    start = _restore(stage, vae, optimizers, average)
    losses = _Losses(vae)
    decoder_loss = torch.compile(losses.decoder) if recipe.compile else losses.decoder
    encoder_loss = torch.compile(losses.encoder) if recipe.compile else losses.encoder
    for step in range(start, stage.end):
        video = crops(step, recipe)
        z = code.encode(video.transpose(1, 2)).transpose(1, 2).to(device)
        video, noise = video.to(device), noise_like(z, torch.Generator().manual_seed(step))
        row: dict[str, float] = {}
        with fast_precision(device):
            loss = decoder_loss(z + NOISE * noise, video)
        torch.autograd.backward(loss)
        row["decoder"] = loss.item()
        if step % recipe.encoder_every == 0:
            with fast_precision(device):
                loss = encoder_loss(video, z)
            torch.autograd.backward(loss)
            row["encoder"] = loss.item()
        optimizers.step(trapezoid(step, recipe.steps, cool_down=recipe.cool_down))
        average.update(named, step)
        stage.after(
            step,
            row,
            lambda: {"vae": vae.state_dict(), "average": average.values, "optimizers": optimizers.state_dict()},
        )
    with torch.no_grad():
        for name, value in average.values.items():
            named[name].copy_(value)
    return vae.eval()


def _restore(stage: Stage, vae: nn.Module, optimizers: Optimizers, average: Average) -> int:
    state = stage.resume()
    if state is None:
        return 0
    vae.load_state_dict(cast("dict[str, Tensor]", state["vae"]))
    average.load(cast("dict[str, Tensor]", state["average"]))
    optimizers.load_state_dict(cast("list[dict[str, object]]", state["optimizers"]))
    return cast(int, state["step"])
