"""What a context policy costs: held-out captions, videos by the product's own loop, numbers read off their pixels.

    python -m shapes.evaluate --policies full,window,prune,packed,anchored --out FOLDER

prints a table and writes report.json and report.svg: videos of one caption, videos with a switch, with ten switches
(33 s), and of a minute (`shapes.score`, `shapes.story_score`). `--gate FILE` holds a short run to bounds and ends with
status 1 when one is not met. Every policy gets the same captions and the same noise. `full@bf16` and `full@fp8` are
the policy with the transformer in bf16, and with its linear layers in FP8 besides, as `precision` has them on a GPU.
`truth` is no policy: it is the world's own films through the VAE, which no transformer can beat.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dummy.config import ONLINE
from pipeline.config.config import InferenceConfig, load_config
from pipeline.runtime.generator import BlockGenerator
from pipeline.runtime.loading import generator_settings, load_transformer, load_vae, model_sizes, require_files
from pipeline.session import Session
from shapes.data import BLOCK, Clip, as_video, make_clip, pixel_frame
from shapes.measure import psnr
from shapes.report import Report, check_gate, gate_bounds, table, write_report
from shapes.score import Score, score
from shapes.story_score import LongScore, SceneScore, score_long, score_scenes
from shapes.world import HEIGHT, WIDTH, Floats, as_floats
from utils import command
from utils.config import text_override
from utils.errors import InputError
from utils.files import ensure_writable_folder
from utils.profiler import device_name
from utils.seed import NoiseStream, video_seed
from wan.geometry import LatentGeometry
from wan.text import TextEncoder, pad
from wan.transformer.fp8 import to_fp8
from wan.transformer.model import CausalWanModel
from wan.vae.vae import VAE

logger = logging.getLogger(__name__)

CAPTION_SEED, STORYBOARD_SEED, TEN_SEED, LONG_SEED = 31, 32, 33, 34  # unlike every seed of training
SWITCHES = (6, 9, 12)  # latent frames
TEN_SWITCHES = tuple(range(12, 132, 12))  # of a video of 132 latent frames
TEN_FRAMES, LONG_FRAMES = 132, 240  # latent frames: 33 s and 60 s
CONFIG = "configs/shapes_demo.yaml"
CALIBRATION = "checkpoints/shapes/calibration.safetensors"  # checkpoints/shapes/README.md has the command
MANY_FRAMES = 2  # long videos made together
WINDOW = 7  # latent frames: the first, three recent ones, and the block: what a neighbour head and a sink head keep
LEAST_FRAMES = 4 * BLOCK  # latent frames of a video: the time of its fourth block counts
LEAST_OF_STORYBOARDS = max(SWITCHES) + 2 * BLOCK  # a block in which a switch is obeyed, and one that is scored
HALF = "dummy_forcing.num_dummy=0.5"  # of the heads


def calibrated(frames: float, calibration: str | Path = CALIBRATION) -> list[str]:
    """Settings of calibrated memory with so many frames a head."""
    chosen = ["dummy_forcing.enabled=true", "dummy_forcing.policy=calibrated"]
    file = text_override("dummy_forcing.calibration", str(calibration))
    return [*chosen, file, f"dummy_forcing.frames_per_head={frames}"]


POLICIES = {
    "full": ["dummy_forcing.enabled=false", "model_kwargs.local_attn_size=-1"],
    "window": ["dummy_forcing.enabled=false", f"model_kwargs.local_attn_size={WINDOW}", "model_kwargs.sink_size=1"],
    "prune": [
        "dummy_forcing.enabled=true",
        "dummy_forcing.policy=prune",
        "dummy_forcing.preset=paper",
        "model_kwargs.local_attn_size=-1",
        HALF,
    ],
    "packed": ["dummy_forcing.enabled=true", "dummy_forcing.policy=packed", "dummy_forcing.preset=paper", HALF],
    "anchored": ["dummy_forcing.enabled=true", "dummy_forcing.policy=packed", "dummy_forcing.preset=anchored", HALF],
}
# Frames a head: the cost of packed, half of the window's, and the window's.
POLICIES |= {f"calibrated:{frames:g}": calibrated(frames) for frames in (1.33, 2, 4)}
POLICIES |= {f"{ONLINE}:{frames:g}": calibrated(frames, ONLINE) for frames in (1.33, 2, 4)}
TRUTH = "truth"
POLICIES[TRUTH] = POLICIES["full"]
# What a policy needs for videos without end: no distance beyond what was trained, and a window for what a switch
# re-encodes. A full history has neither.
STREAMING = ["rope=relative", "model_kwargs.local_attn_size=10", "model_kwargs.sink_size=1"]
PRECISIONS = ("", "bf16", "fp8")  # after an @


@dataclass
class Parts:
    """The loaded models, shared by all policies."""

    model: CausalWanModel
    vae: VAE
    text: TextEncoder
    captions: dict[str, Tensor] = field(default_factory=dict)
    truth: bool = False  # the world's films instead of what the model generates

    @classmethod
    def load(cls, config: InferenceConfig) -> Parts:
        sizes = model_sizes(config)
        device, dtype = torch.device("cpu"), torch.float32
        text = TextEncoder.load(config.text_encoder_path, config.tokenizer_path, dtype, device, sizes.text_len)
        return cls(load_transformer(config, sizes, device, dtype), load_vae(config, device, dtype), text)

    def embed(self, caption: str) -> Tensor:
        """[length, text_dim]; each caption is encoded once."""
        if caption not in self.captions:
            self.captions[caption] = self.text.encode([caption])[0]
        return self.captions[caption]

    def embeds(self, captions: Sequence[str]) -> Tensor:
        """[B, text_len, text_dim]."""
        return pad([self.embed(caption) for caption in captions], self.model.config.text_len)

    def of(self, policy: str) -> Parts:
        """The same with the transformer in the precision that the policy names after an @; films for TRUTH."""
        name, _, precision = policy.partition("@")
        assert precision in PRECISIONS
        if name == TRUTH:
            return replace(self, truth=True)
        if not precision:
            return self
        model = copy.deepcopy(self.model).to(torch.bfloat16)
        if precision == "fp8":
            to_fp8(model)
        return replace(self, model=model)


@dataclass(frozen=True)
class Batch:
    """Videos [B, frames, H, W, 3] in 0..1, milliseconds of each block for one video, and how the rollout ended."""

    videos: Floats
    block_ms: list[float]
    current_share: Tensor | None  # [layers, heads] of attention on the block itself, where it was observed
    context: float  # earlier frames that a head of the last block sees, as a mean over all heads


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    args = _arguments(given)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    torch.set_num_threads(args.threads)
    ensure_writable_folder(args.out, "--out")
    if args.gate is not None:
        gate_bounds(args.gate)
    report = evaluate(args.config, args.policies.split(","), args)
    sys.stdout.write(table(report.as_dict()))
    write_report(report, args.out, about("shapes.evaluate", given))
    return check_gate(report, args.gate) if args.gate else 0


def about(module: str, arguments: Sequence[str]) -> dict[str, object]:
    """What a stored result says of how and where it was made."""
    device = f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads"
    return {"command": shlex.join([module, *arguments]), "device": device, "torch": torch.__version__}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--policies", default=",".join(POLICIES), help=f"of {', '.join(POLICIES)}, also @bf16 or @fp8; full first"
    )
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings for all policies")
    parser.add_argument("--captions", type=command.count, default=64, help="held-out captions")
    parser.add_argument(
        "--storyboards", type=command.count_or_zero, default=32, help="captions with a second one that takes over"
    )
    parser.add_argument("--ten", type=command.count_or_zero, default=4, help="videos with ten switches")
    parser.add_argument("--long", type=command.count_or_zero, default=8, help="videos of a minute")
    parser.add_argument("--seeds", type=command.count, default=1, help="videos a caption, each with its own noise")
    parser.add_argument("--batch", type=command.count, default=8)
    parser.add_argument("--threads", type=command.count, default=2)
    parser.add_argument("--out", type=Path, default=Path("demo/shapes_evaluation"))
    parser.add_argument("--gate", type=Path, help="JSON file of bounds that the report must keep")
    args = parser.parse_args(argv)
    names = args.policies.split(",")
    for name in names:
        policy, _, precision = name.partition("@")
        if policy not in POLICIES or precision not in PRECISIONS or (policy == TRUTH and precision):
            parser.error(f"--policies: {name!r} is none of {', '.join(POLICIES)}, alone or with @bf16 or @fp8")
    if len(names) > 1 and names[0] != "full":
        parser.error("--policies: full comes first, by which PSNR goes, unless there is but one")
    return args


def check_scored(config: InferenceConfig, least: int = LEAST_FRAMES) -> None:
    """Raises InputError if a file is missing, or the videos cannot be scored, of which `least` latent frames can be."""
    require_files(config)
    taken = {"device": ("auto", "cpu"), "start_from": (None,), "parallel": (None,)}
    ignored = [name for name, values in taken.items() if getattr(config, name) not in values]
    if ignored:
        raise InputError(f"{', '.join(ignored)}: scored videos begin with noise and are made on the CPU; leave it out")
    if config.pixel_size != (HEIGHT, WIDTH):
        raise InputError(f"resolution: the world has {HEIGHT} x {WIDTH} pixels, got {config.resolution}; leave it out")
    if config.num_output_frames < least:
        reason = "steady blocks begin with the fourth"
        if least != LEAST_FRAMES:
            reason = f"storyboards switch at frame {max(SWITCHES)} and go on for two blocks"
        raise InputError(
            f"num_output_frames: {reason}, got {config.num_output_frames} latent frames; use {least} or more"
        )


def evaluate(config_path: str, policies: Sequence[str], args: argparse.Namespace) -> Report:
    """Generate and score; the first policy is the reference of the PSNR."""
    settings = {name: [*POLICIES[name.split("@")[0]], *args.set] for name in policies}
    configs = {name: load_config(config_path, chosen) for name, chosen in settings.items()}
    for config in configs.values():
        check_scored(config, LEAST_OF_STORYBOARDS if args.storyboards else LEAST_FRAMES)
    loaded = Parts.load(next(iter(configs.values())))
    clips = [make_clip(CAPTION_SEED, index, held=True) for index in range(args.captions)] * args.seeds
    report = Report(list(policies))
    reference: list[Floats] = []
    for name, config in configs.items():
        began = time.monotonic()
        parts = loaded.of(name)
        for number, (batch, group) in enumerate(generate(parts, config, clips, args.batch)):
            if name == policies[0]:
                reference.append(batch.videos)
            for video, other, clip in zip(batch.videos, reference[number], group, strict=True):
                fidelity = math.nan if name in (policies[0], TRUTH) else _fidelity(video, other, config)
                report.add(name, row_of(score(video, clip.scene)) | {"psnr": fidelity})
            report.add_batch(name, batch.block_ms, batch.current_share)
        streaming = settings[name] if name.split("@")[0] == "full" else [*settings[name], *STREAMING]
        _evaluate_stories(report, name, parts, partial(load_config, config_path), settings[name], streaming, args)
        logger.info("%s: %.0f s", name, time.monotonic() - began)
    return report


def _evaluate_stories(
    report: Report,
    name: str,
    parts: Parts,
    config: Callable[[list[str]], InferenceConfig],
    settings: list[str],
    streaming: list[str],
    args: argparse.Namespace,
) -> None:
    """A switch, as the policy is; ten switches and a minute, as it is for videos without end."""
    one = [make_clip(STORYBOARD_SEED, i, (SWITCHES[i % len(SWITCHES)],), held=True) for i in range(args.storyboards)]
    for batch, group in generate(parts, config(settings), one, args.batch):
        for video, clip in zip(batch.videos, group, strict=True):
            last = score_scenes(video, clip)[-1]
            kind = "scene" if clip.commands[-1].scene else "command"
            report.add(name, {**_prefixed("later", last), f"later_{kind}_right": last.right})
    frames = pixel_frame(TEN_FRAMES)
    ten = [make_clip(TEN_SEED, i, TEN_SWITCHES, frames, held=True) for i in range(args.ten)]
    for batch, group in generate(parts, config([*streaming, f"num_output_frames={TEN_FRAMES}"]), ten, MANY_FRAMES):
        for video, clip in zip(batch.videos, group, strict=True):
            report.add(name, {"ten_right": float(np.mean([scene.right for scene in score_scenes(video, clip)]))})
    long = [make_clip(LONG_SEED, i, frames=pixel_frame(LONG_FRAMES), held=True) for i in range(args.long)]
    for batch, group in generate(parts, config([*streaming, f"num_output_frames={LONG_FRAMES}"]), long, MANY_FRAMES):
        for video, clip in zip(batch.videos, group, strict=True):
            report.add(name, _prefixed("long", score_long(video, clip)))


def _prefixed(kind: str, result: SceneScore | LongScore) -> dict[str, float]:
    """A storyboard's or a long video's numbers as metrics of the report."""
    return {f"{kind}_{name}": value for name, value in {**asdict(result), "right": result.right}.items()}


def row_of(result: Score) -> dict[str, float]:
    return {name: getattr(result, name) for name in Score.names()} | {"remembered": result.remembered}


def _fidelity(video: Floats, other: Floats, config: InferenceConfig) -> float:
    """PSNR in dB against the reference policy from the first block that a split can change."""
    first = pixel_frame(BLOCK * (config.dummy_forcing.ar_start + 1))
    return psnr(video[first:], other[first:])


def generate(
    parts: Parts, config: InferenceConfig, clips: Sequence[Clip], size: int
) -> Iterator[tuple[Batch, list[Clip]]]:
    """Videos in batches of at most `size` clips with equal switches; the noise depends on a clip's place alone."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, clip in enumerate(clips):
        places.setdefault(clip.starts, []).append(place)
    for equal in places.values():
        for first in range(0, len(equal), size):
            group = equal[first : first + size]
            seeds = [video_seed(config.seed, place, 0) for place in group]
            chosen = [clips[place] for place in group]
            yield _filmed(parts, chosen) if parts.truth else _batch(parts, config, chosen, seeds), chosen


@torch.inference_mode()
def _filmed(parts: Parts, clips: Sequence[Clip]) -> Batch:
    """The films that captions describe, as the VAE gives them back."""
    latents = [parts.vae.encode(as_video(clip.video)[None]) for clip in clips]
    pixels = [parts.vae.decoder(one.shape[1]).decode(one) for one in latents]
    return Batch(_floats(torch.cat(pixels)), [math.nan] * latents[0].shape[1], None, math.nan)


@torch.inference_mode()
def _batch(parts: Parts, config: InferenceConfig, clips: Sequence[Clip], seeds: Sequence[int]) -> Batch:
    generator = BlockGenerator(parts.model, generator_settings(config, parts.model.config))
    height, width = config.latent_size
    geometry = LatentGeometry(height, width, config.num_output_frames, config.num_frame_per_block)
    storyboard = [(start, tuple(clip.captions[i] for clip in clips)) for i, start in enumerate(clips[0].starts)]
    decoder = parts.vae.decoder(config.num_output_frames)
    pieces, times = [], []
    with Session(generator, geometry, NoiseStream(seeds), parts.embed, batch=len(seeds), live=False) as session:
        session.plan(storyboard)
        for block in session:
            pieces.append(decoder.decode(block.latents))
            times.append(1000 * block.seconds / len(clips))  # its predecessor's clean pass included
        attention, context = session.rollout.frame_attention, session.rollout.cache.frames_per_head
    return Batch(_floats(torch.cat(pieces, dim=1)), times, None if attention is None else attention[..., 2], context)


def _floats(pixels: Tensor) -> Floats:
    """Decoded pixels [B, frames, 3, H, W] in -1..1 as videos [B, frames, H, W, 3] in 0..1."""
    return as_floats(pixels.permute(0, 1, 3, 4, 2).float().numpy() / 2 + 0.5)


if __name__ == "__main__":
    raise SystemExit(command.run(main, log_format=None))
