"""Whole clips as a user waits for them: python -m benchmarks.end_to_end [--resolution 480 --policy packed --json FILE]

Random weights of the full size and random prompt embeddings: no checkpoint, no text encoder. Every clip is made with
the decoder and the writer beside the denoising, and one after the other; the difference is what overlap wins. Frames
go to an mp4 if the encoder is installed, else, or with --no_file, to nowhere. On a CPU the models are reduced
(`--dim`, `--layers`, `--width`), and only ratios mean something.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.arguments import device_here, multiple_of, result_file, some_of, store
from benchmarks.dit import BLOCK, LATENT_SIZES, model_config
from benchmarks.machine import facts
from benchmarks.steady import POLICIES, STEPS, build_model, make_policy
from benchmarks.vae import random_vae
from dummy.config import ONLINE, DummyForcingConfig
from dummy.policies.registry import policy_from_config
from dummy.policy import ContextPolicy
from pipeline.assembly import Parts, Pipeline
from pipeline.config.config import InferenceConfig, geometry_of
from pipeline.planning.plan import Planner
from pipeline.runtime.calibrated import online_dial
from pipeline.runtime.decoding import fastest_strategy, start_decoder
from pipeline.runtime.engine import WAYS, passes_of, warmup
from pipeline.runtime.generator import BlockGenerator
from pipeline.runtime.inputs import GeneratorSettings
from pipeline.runtime.schedule import DenoisingSchedule
from pipeline.video_files import FrameWriter, deliver, profile_of
from utils import command
from utils.profiler import VideoProfile, format_profile
from utils.video import VideoWriter
from wan.config import ModelConfig
from wan.geometry import pixel_frames
from wan.vae.vae import VAE


@dataclass
class Arrivals:
    """A writer that notes when frames come, and passes them on if there is a file."""

    file: VideoWriter | None = None
    times: list[float] = field(default_factory=list)

    def write(self, frames: Tensor) -> None:
        self.times.append(time.perf_counter())
        if self.file is not None:
            self.file.write(frames)

    def kill(self) -> None:
        if self.file is not None:
            self.file.kill()

    @property
    def steady_fps(self) -> float | None:
        """Frames a second between the arrivals of blocks, once two have come."""
        gaps = [later - earlier for earlier, later in zip(self.times[1:], self.times[2:], strict=False)]
        return pixel_frames(BLOCK, first=False) / statistics.median(gaps) if gaps else None


@dataclass(frozen=True)
class Row:
    resolution: str
    policy: str
    engine: str
    overlap: bool
    total_ms: float  # the median clip
    first_frame_ms: float
    block_ms: float  # diffusion of a block, median
    decode_ms: float  # a block's
    copy_ms: float
    write_ms: float
    init_ms: float
    fps: float  # of the whole clip
    steady_fps: float | None  # between arrivals of blocks
    won_ms: float | None  # against the same without overlap
    peak_bytes: int | None
    reserved_bytes: int | None = None  # by the allocator of a GPU, with what captured passes have for themselves
    planned_bytes: int = 0  # what the plan says of these sizes


def row(name: tuple[str, str, str, bool], profiles: Sequence[tuple[VideoProfile, float | None]], planned: int) -> Row:
    """The median clip of several; `planned` bytes are what it was to take."""
    profile, steady = sorted(profiles, key=lambda pair: pair[0].total_ms)[len(profiles) // 2]
    blocks = len(profile.block_ms)
    parts = (profile.vae_ms / blocks, profile.copy_ms / blocks, profile.write_ms / blocks, profile.init_ms)
    times = (profile.total_ms, profile.first_frame_ms or 0.0, statistics.median(profile.block_ms), *parts)
    rates = profile.end_to_end_fps or 0.0, steady, None
    return Row(*name, *times, *rates, profile.peak_bytes, profile.reserved_bytes, planned)


def clip_policy(name: str, sizes: ModelConfig, config: InferenceConfig) -> ContextPolicy:
    """As `make_policy`; or "observed", packed with roles that every video observes, or "online", memory that every
    video calibrates."""
    half = sizes.num_layers * sizes.num_heads // 2
    window, block = config.model_kwargs, config.num_frame_per_block
    if name == "observed":
        return policy_from_config(window, DummyForcingConfig(True, "packed", num_dummy=half), block)
    if name == "online":
        return policy_from_config(
            window,
            DummyForcingConfig(True, "calibrated", calibration=ONLINE, frames_per_head=4 / 3),
            block,
            dial=online_dial(config, sizes),
            model=sizes,
        )
    return make_policy(name, sizes, block)


class Bench:
    """One generator and one VAE, and clips made with them."""

    def __init__(self, arguments: argparse.Namespace, resolution: str, policy: str, device: torch.device) -> None:
        sizes = model_config(arguments, device)
        model = build_model(sizes, device)
        vae = random_vae(arguments.width, device, model.dtype)
        height, width = LATENT_SIZES[resolution]
        size: int | tuple[int, int] = int(resolution) if resolution.isdigit() else (height * 8, width * 8)
        engine = arguments.engine if arguments.engine in ("eager", "compiled") else "graphed"
        config = InferenceConfig(
            resolution=size, num_output_frames=arguments.frames, num_frame_per_block=BLOCK, engine=engine
        )
        schedule = DenoisingSchedule.build(STEPS, 5.0, warp=True)
        generator = BlockGenerator(model, GeneratorSettings(schedule, clip_policy(policy, sizes, config)))
        embed = torch.randn(sizes.text_len // 8, sizes.text_dim, generator=torch.Generator().manual_seed(0))
        self._parts = Parts(generator, vae, None, fastest_strategy(device, BLOCK, True), lambda _: embed)
        self._config = config
        self._geometry = geometry_of(config, sizes.in_dim)
        self.device = device
        self._start(arguments.engine, generator, vae)

    def _start(self, engine: str, generator: BlockGenerator, vae: VAE) -> None:
        if engine != "eager":
            generator.passes = passes_of(generator.model, engine)
            warmup(generator, self._geometry)
        latents = torch.zeros(1, *self._geometry.block_shape, device=self.device)
        start_decoder(vae, engine, True, latents)

    def forget(self) -> None:
        """Let go of what the last clips have left for the next."""
        vae = self._parts.vae
        assert isinstance(vae, VAE)
        vae.forget()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def planned(self, overlap: bool) -> int:
        """Bytes on a GPU as the plan has them."""
        generator, vae = self._parts.generator, self._parts.vae
        assert isinstance(vae, VAE)
        width = vae.config.base_dim
        decoder = random_vae(width, torch.device("cpu"), vae.dtype).to("meta").lay_out_for(self.device)
        planner = Planner(generator.model.config, decoder, vae.dtype, vae_device=self.device, device=self.device)
        return planner.memory(self._config, generator.settings, fastest_strategy(self.device, BLOCK, overlap)).peak

    def clip(self, overlap: bool, folder: Path | None) -> tuple[VideoProfile, float | None]:
        """The profile of a clip, and its steady frames a second."""
        pipeline = Pipeline(self._config, self._parts._replace(strategy=fastest_strategy(self.device, BLOCK, overlap)))
        frames = self._config.num_output_frames
        with pipeline.session(frames=frames, live=False, keep_buffers=True) as session, ExitStack() as files:
            session.plan([(0, "noise")])
            file = None
            if folder is not None:
                height, width = self._config.pixel_size
                file = files.enter_context(VideoWriter(folder / "clip.mp4", width, height))
            writer = Arrivals(file)
            writers: list[FrameWriter] = [writer]
            counts = deliver(session, writers, session.profiler, lambda _: None, overlap)
            with session.profiler.host_span("write"):
                files.close()
            return profile_of(session, counts), writer.steady_fps


def measure(arguments: argparse.Namespace, resolution: str, policy: str, device: torch.device) -> Iterator[Row]:
    bench = Bench(arguments, resolution, policy, device)
    with tempfile.TemporaryDirectory() as name:
        folder = None if arguments.no_file else Path(name)
        without = 0.0
        for overlap in (False, True):
            bench.forget()
            bench.clip(overlap, folder)  # makes its decoder, on its own stream
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            profiles = [bench.clip(overlap, folder) for _ in range(arguments.repeat)]
            made = row((resolution, policy, arguments.engine, overlap), profiles, bench.planned(overlap))
            if arguments.profile:
                print(format_profile(profiles[-1][0]))
            if not overlap:
                without = made.total_ms
                yield made
            else:
                yield Row(**{**asdict(made), "won_ms": without - made.total_ms})


HEADER = "{:6}{:9}{:10}{:8}{:>10}{:>9}{:>9}{:>9}{:>8}{:>8}{:>8}{:>8}{:>8}{:>10}{:>10}{:>10}".format(
    *("rows", "policy", "engine", "overlap", "ms/clip", "first", "ms/block", "decode", "copy", "write", "FPS"),
    *("steady", "won ms", "peak MiB", "reserved", "planned"),
)


def line(made: Row) -> str:
    steady, won = ("" if value is None else f"{value:.2f}" for value in (made.steady_fps, made.won_ms))
    sizes = (made.peak_bytes, made.reserved_bytes, made.planned_bytes)
    peak, reserved, planned = ("" if size is None else f"{size / 2**20:.0f}" for size in sizes)
    return (
        f"{made.resolution:6}{made.policy:9}{made.engine:10}{'yes' if made.overlap else 'no':8}{made.total_ms:10.1f}"
        f"{made.first_frame_ms:9.1f}{made.block_ms:9.1f}{made.decode_ms:9.1f}{made.copy_ms:8.2f}{made.write_ms:8.1f}"
        f"{made.fps:8.2f}{steady:>8}{won:>8}{peak:>10}{reserved:>10}{planned:>10}"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=device_here, default=default)
    parser.add_argument("--resolution", type=some_of(LATENT_SIZES), help="480, 720, 1080 or tiny; several with commas")
    known = (*POLICIES, "observed", "online")
    parser.add_argument("--policy", type=some_of(known), default="packed", help=f"of {', '.join(known)}")
    parser.add_argument("--engine", choices=WAYS, help="graphed, compiled, recorded or eager")
    parser.add_argument("--frames", type=command.count, default=21, help="latent frames; 21 are 81 frames")
    parser.add_argument("--repeat", type=command.count, default=3)
    parser.add_argument("--layers", type=command.count)
    parser.add_argument("--dim", type=multiple_of(64))
    parser.add_argument("--width", type=command.count, help="base_dim of the VAE; that of Wan 2.1 is 96")
    parser.add_argument("--no_file", action="store_true", help="throw the frames away")
    parser.add_argument("--profile", action="store_true", help="print the profile of a clip, too")
    parser.add_argument("--memory", type=float, metavar="GIB", help="as if the GPU had no more: does a clip fit?")
    parser.add_argument("--json", type=result_file)
    arguments = parser.parse_args(argv)
    gpu = arguments.device.type == "cuda"
    if arguments.memory is not None and not (gpu and arguments.memory > 0):
        parser.error(f"--memory {arguments.memory:g}: GiB of a GPU (--device cuda), more than none")
    arguments.resolution = arguments.resolution or ("480" if gpu else "tiny")
    arguments.engine = arguments.engine or ("graphed" if gpu else "eager")
    arguments.width = arguments.width or (96 if gpu else 24)
    arguments.no_file = arguments.no_file or importlib.util.find_spec("imageio_ffmpeg") is None
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    device: torch.device = arguments.device
    about = facts(device, ["benchmarks.end_to_end", *(sys.argv[1:] if argv is None else argv)])
    print(f"{about['device']}, torch {about['torch']}, {'no file' if arguments.no_file else 'to an mp4'}")
    print(HEADER, flush=True)
    rows: list[Row] = []
    if arguments.memory is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, arguments.memory * 2**30 / total), device)
    for resolution in arguments.resolution.split(","):
        for policy in arguments.policy.split(","):
            for made in measure(arguments, resolution, policy, device):
                rows.append(made)
                print(line(made), flush=True)
                stored = {"file": not arguments.no_file, "rows": [asdict(one) for one in rows]}
                store({**about, **stored}, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main, log_format=None))
