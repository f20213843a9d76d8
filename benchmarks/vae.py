"""The VAE's decoder alone: python -m benchmarks.vae [--resolution 480,720,1080 --engine eager,compiled,graphed]

A clip of 81 frames in blocks of 12, with random weights of the full size. Diffusers' decode of the whole clip, in the
same dtype and the same run, is the first row; peak signal to noise is against Diffusers in float32. On a CPU the
decoder is reduced (`--width`), and only ratios mean something. Rows are stored as they come.

What a preview decoder loses and wins: --preview taew2_1.pth --vae Wan2.1_VAE.pth --video FILE adds its rows, on the
latents of a real video (scaled and cropped to the resolution) and the VAE's real weights. Random ones give it no dB.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.arguments import device_here, result_file, some_of, store
from benchmarks.dit import BLOCK, LATENT_SIZES
from benchmarks.machine import ceilings, facts, seconds
from pipeline.config.config import InferenceConfig
from pipeline.runtime.decoding import fastest_strategy, start_decoder
from pipeline.runtime.engine import WAYS
from pipeline.runtime.prefix import load_prefix
from utils import command
from utils.memory import PeakTracker, format_bytes
from wan.vae.modules import VAEConfig, VAEModule
from wan.vae.preview import PreviewDecoder
from wan.vae.streaming import LatentDecoder
from wan.vae.vae import VAE


@dataclass(frozen=True)
class Row:
    resolution: str
    decoder: str
    engine: str
    dtype: str
    clip_ms: float  # all frames of the clip
    block_ms: float | None  # a steady block of 12 frames (None: not decoded in blocks)
    ratio: float  # of the first row's clip to this one's
    peak_bytes: int  # beside the weights
    peak_ratio: float  # to the first row's
    decibel: float | None  # to Diffusers in float32 (None: a preview decoder without real weights and a real video)


def random_vae(width: int, device: torch.device, dtype: torch.dtype) -> VAE:
    """Random weights of a kind that keeps the video within its range."""
    config = VAEConfig(base_dim=width)
    with torch.device("meta"):
        module = VAEModule(config)
    module = module.to_empty(device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if "gamma" in name:
            parameter.fill_(1.0)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.normal_(0.0, 1 / math.sqrt(parameter[0].numel()), generator=generator)
    vae = VAE(module, config)
    sample = vae.decoder().decode(torch.randn(1, 1, 16, 8, 8, generator=generator))
    vae.module.decoder.conv_out.weight.mul_(0.3 / sample.std())
    return VAE(module.to(device, dtype), config)


def twin(vae: VAE, as_ours: bool = True) -> Any:
    """Diffusers' AutoencoderKLWan with the same weights; they lie in memory `as_ours`, so that kernels are the same, or
    as Diffusers has them."""
    from diffusers import AutoencoderKLWan

    sizes = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(vae.config).items()}
    build: Any = AutoencoderKLWan  # untyped
    with torch.device("meta"):
        module = build(**sizes)
    weights = vae.module.state_dict()
    if not as_ours:
        weights = {name: weight.contiguous() for name, weight in weights.items()}
    module.load_state_dict(weights, strict=True, assign=True)
    return module.eval()


@torch.no_grad()
def decode_whole(module: Any, vae: VAE, latents: Tensor) -> Tensor:
    z = vae.denormalize(latents).to(vae.dtype).transpose(1, 2)
    video: Tensor = module.decode(z).sample
    return video.transpose(1, 2)


def decode_streamed(vae: LatentDecoder, latents: Tensor, use: Callable[[Tensor], object]) -> None:
    """Block by block; `use` sees every block, and nothing is kept."""
    decoder = vae.decoder(fastest_strategy(vae.device, BLOCK, overlap=False).frames)
    for block in torch.split(latents, BLOCK, dim=1):
        use(decoder.decode(block))
    decoder.close()


def peak_of(function: Callable[[], object], device: torch.device) -> int:
    """Bytes of tensors at once beside those that are there already."""
    if device.type != "cuda":
        with PeakTracker() as tracker:
            function()
        return int(tracker.peak)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def decibel(a: Tensor, b: Tensor) -> float:
    """Peak signal to noise of videos in [-1, 1]."""
    return float(10 * torch.log10(4 / (a.double() - b.double()).square().mean().clamp_min(1e-20)))


def steady_block_seconds(vae: LatentDecoder, latents: Tensor, repeat: int) -> float:
    decoder = vae.decoder(fastest_strategy(vae.device, BLOCK, overlap=False).frames)
    block = latents[:, :BLOCK]
    decoder.decode(block)
    decoder.decode(block)
    took = seconds(lambda: decoder.decode(block), vae.device, repeat)
    decoder.close()
    return took


def make_vae(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> VAE:
    """From `--vae`, or with random weights."""
    if arguments.vae is None:
        return random_vae(arguments.width, device, dtype)
    return VAE.load(arguments.vae, dtype, device)


def make_latents(arguments: argparse.Namespace, resolution: str, vae: VAE) -> Tensor:
    """[1, F, 16, h, w] of `--video`, or random."""
    height, width = LATENT_SIZES[resolution]
    if arguments.video is None:
        shape = (1, arguments.frames, 16, height, width)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(vae.device)
    size = height * vae.spatial_scale, width * vae.spatial_scale
    longest = BLOCK * 10**4
    config = InferenceConfig(resolution=size, num_output_frames=longest, num_frame_per_block=BLOCK, start_from_fit=True)
    return load_prefix(arguments.video, config, vae)[:, : arguments.frames]


def measure(arguments: argparse.Namespace, resolution: str, device: torch.device) -> Iterator[Row]:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    vae = make_vae(arguments, device, dtype)
    exact_vae = make_vae(arguments, device, torch.float32)
    latents = make_latents(arguments, resolution, exact_vae)
    exact = decode_whole(twin(exact_vae), exact_vae, latents).cpu()
    del exact_vae
    name = str(dtype).removeprefix("torch.")
    first = diffusers_row(vae, latents, exact, resolution, name, arguments.repeat)
    yield first
    decoders: dict[str, LatentDecoder] = {"ours": vae}
    if arguments.preview is not None:
        decoders["preview"] = PreviewDecoder.load(arguments.preview, dtype, device)
    real = arguments.vae is not None and arguments.video is not None
    for called, decoder in decoders.items():
        for engine in arguments.engine.split(","):
            known = exact if decoder is vae or real else None
            yield streamed_row(called, decoder, engine, latents, known, first, arguments.repeat)


def streamed_row(
    called: str, decoder: LatentDecoder, engine: str, latents: Tensor, exact: Tensor | None, first: Row, repeat: int
) -> Row:
    start_decoder(decoder, engine, True, latents[:, :BLOCK])
    video = streamed_video(decoder, latents)
    clip = seconds(lambda: decode_streamed(decoder, latents, lambda _: None), decoder.device, repeat) * 1000
    block = steady_block_seconds(decoder, latents, repeat) * 1000
    if engine in ("eager", "compiled"):
        decoder.forget()  # so that what a video needs is counted; a recording keeps its memory
    peak = peak_of(lambda: decode_streamed(decoder, latents, lambda _: None), decoder.device)
    ratios = first.clip_ms / clip, peak, peak / first.peak_bytes
    loss = None if exact is None else decibel(video, exact)
    return Row(first.resolution, called, engine, first.dtype, clip, block, *ratios, loss)


def diffusers_row(vae: VAE, latents: Tensor, exact: Tensor, resolution: str, dtype: str, repeat: int) -> Row:
    module = twin(vae, as_ours=False)
    for parameter in module.parameters():  # as it is loaded
        parameter.data = parameter.data.contiguous()
    video = decode_whole(module, vae, latents).cpu()
    clip = seconds(lambda: decode_whole(module, vae, latents), vae.device, repeat) * 1000
    peak = peak_of(lambda: decode_whole(module, vae, latents), vae.device)
    return Row(resolution, "Diffusers", "eager", dtype, clip, None, 1.0, peak, 1.0, decibel(video, exact))


def streamed_video(vae: LatentDecoder, latents: Tensor) -> Tensor:
    pieces: list[Tensor] = []
    decode_streamed(vae, latents, lambda video: pieces.append(video.cpu()))
    return torch.cat(pieces, dim=1)


def line(row: Row) -> str:
    block, loss = ("" if value is None else f"{value:.1f}" for value in (row.block_ms, row.decibel))
    return (
        f"{row.resolution:6}{row.decoder:10}{row.engine:10}{row.dtype:10}{row.clip_ms:10.1f}{block:>10}{row.ratio:8.2f}"
        f"{format_bytes(row.peak_bytes):>12}{row.peak_ratio:8.2f}{loss:>8}"
    )


HEADER = "{:6}{:10}{:10}{:10}{:>10}{:>10}{:>8}{:>12}{:>8}{:>8}".format(
    "rows", "decoder", "engine", "dtype", "ms/clip", "ms/block", "faster", "peak", "peak/D", "dB"
)


def main(argv: Sequence[str] | None = None) -> int:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=device_here, default=default)
    parser.add_argument("--resolution", type=some_of(LATENT_SIZES), help="480, 720, 1080 or tiny; several with commas")
    parser.add_argument(
        "--engine", type=some_of(WAYS), help="eager, compiled, recorded, graphed; on a CPU they are the same"
    )
    parser.add_argument("--width", type=command.count, help="base_dim of the VAE; that of Wan 2.1 is 96")
    parser.add_argument("--vae", type=Path, help="Wan2.1_VAE.pth or a Diffusers folder; random weights without")
    parser.add_argument("--preview", type=Path, help="taew2_1.pth or .safetensors: measure this decoder, too")
    parser.add_argument("--video", type=Path, help="a short video whose latents are decoded; random ones without")
    parser.add_argument("--frames", type=command.count, default=21, help="latent frames, at most; 21 are 81 frames")
    parser.add_argument("--repeat", type=command.count)
    parser.add_argument("--search", action="store_true", help="let cuDNN try its kernels out; may change last bits")
    parser.add_argument("--json", type=result_file)
    arguments = parser.parse_args(argv)
    device: torch.device = arguments.device
    torch.backends.cudnn.benchmark = arguments.search
    gpu = device.type == "cuda"
    arguments.resolution = arguments.resolution or ("480,720" if gpu else "tiny")
    arguments.engine = arguments.engine or ("graphed,compiled,eager" if gpu else "eager")
    arguments.width = arguments.width or (96 if gpu else 24)
    arguments.repeat = arguments.repeat or (5 if gpu else 1)
    given = ["benchmarks.vae", *(sys.argv[1:] if argv is None else argv)]
    weights = f"random weights of width {arguments.width}" if arguments.vae is None else str(arguments.vae)
    about = {**facts(device, given), "weights": weights, "frames": arguments.frames}
    if gpu:
        about["ceilings"] = ceilings(device, torch.bfloat16)
    print(f"{about['device']}, torch {about['torch']}, {weights}, {arguments.frames} latent frames")
    print(HEADER, flush=True)
    rows: list[Row] = []
    for resolution in arguments.resolution.split(","):
        for row in measure(arguments, resolution, device):
            rows.append(row)
            print(line(row), flush=True)
            store({**about, "rows": [asdict(one) for one in rows]}, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main, log_format=None))
