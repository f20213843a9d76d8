"""What fits into which card, as calculated: python -m benchmarks.memory [--videos] [--json FILE]

For the 1.3B model in bf16 with packed heads, from the same plan as `--dry_run`: bytes of tensors, with a tenth of the
card left for libraries and the allocator. Nothing is loaded or measured.

With --videos, for each policy, the most that a whole video of 21 latent frames takes as cache and activations: the loop
itself, with roles that are observed, run on the meta device, where tensors have sizes and no values; once of 480 rows
and once of a sixteenth of their tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace

import torch
from torch import Tensor

from benchmarks.arguments import result_file, store
from benchmarks.dit import BLOCK
from benchmarks.steady import STEPS
from benchmarks.tables import memory
from dummy.config import DummyForcingConfig
from dummy.policies.registry import policy_from_config
from dummy.policy import HeadSplit
from dummy.roles import HeadRoles
from pipeline.config.config import InferenceConfig, geometry_of
from pipeline.planning.cost import assumed_roles
from pipeline.planning.plan import RESERVE, Planner
from pipeline.runtime.decoding import DecodeStrategy
from pipeline.runtime.generator import BlockGenerator
from pipeline.runtime.inputs import GeneratorSettings, Segment
from pipeline.runtime.loading import generator_settings
from pipeline.runtime.schedule import DenoisingSchedule
from utils import command
from utils.memory import PeakTracker, format_bytes
from utils.seed import ZeroNoise
from wan.config import WAN_1_3B, ModelConfig, ModelKwargs
from wan.vae.vae import VAE

SMALL = (112, 224)  # rows and columns of pixels
CARDS = (8, 12, 16, 24, 40, 80)  # GB as they are sold, which are about GiB
RESOLUTIONS = (480, 720, 1080)


@dataclass(frozen=True)
class Row:
    resolution: int
    card: int
    peak_gib: float
    host_gib: float  # of the VAE's cache, if it lies there
    fits: bool
    strategy: DecodeStrategy


def configuration(resolution: int) -> InferenceConfig:
    window = ModelKwargs(local_attn_size=12, sink_size=3)
    forcing = DummyForcingConfig(num_dummy=180)
    return InferenceConfig(resolution=resolution, model_kwargs=window, dummy_forcing=forcing)


def rows(planner: Planner, resolutions: Sequence[int] = RESOLUTIONS, cards: Sequence[int] = CARDS) -> list[Row]:
    made = []
    for resolution in resolutions:
        config = configuration(resolution)
        settings = generator_settings(config, planner.sizes)
        stages = planner.stages(config, settings)
        plans = [(way, planner.memory(config, settings, way, stages=stages)) for way in planner.strategies(config)]
        for card in cards:
            room = card * 2**30 * (1 - RESERVE)
            fitting = [pair for pair in plans if pair[1].peak <= room]
            strategy, plan = fitting[0] if fitting else min(plans, key=lambda pair: pair[1].peak)
            sizes = plan.peak / 2**30, plan.vae_cache_on_host / 2**30
            made.append(Row(resolution, card, *sizes, bool(fitting), strategy))
    return made


@dataclass(frozen=True)
class ObservedSplit(HeadSplit):
    """Observes the attention of heads as a run does; what it finds are the assumed roles, since it has no values."""

    sizes: ModelConfig = WAN_1_3B

    def find_roles(self, by_frame: Tensor) -> tuple[HeadRoles, Tensor]:
        return assumed_roles(self.sizes, self), by_frame


def video_bytes(planner: Planner, policy: str, resolution: int | tuple[int, int] = 480) -> int:
    """The most that the cache and the activations of a video take together."""
    sizes, model = planner.sizes, planner.model
    windowed = policy == "window"
    window = ModelKwargs(local_attn_size=12 if windowed else -1, sink_size=3 if windowed else 0)
    dummy = DummyForcingConfig(policy in ("packed", "prune"), "prune" if policy == "prune" else "packed", num_dummy=0.5)
    context = policy_from_config(window, dummy, BLOCK)
    if context.split is not None:
        parts = {part.name: getattr(context.split, part.name) for part in fields(context.split)}
        context = replace(context, split=ObservedSplit(**parts, sizes=sizes))
    settings = GeneratorSettings(DenoisingSchedule.build(STEPS, 5.0, warp=True), context)
    geometry = geometry_of(InferenceConfig(resolution=resolution), sizes.in_dim)
    generator = BlockGenerator(model, settings)
    with torch.inference_mode():
        text = model.encode_text(torch.empty(1, sizes.text_len, sizes.text_dim, device=model.device))
    with PeakTracker() as tracker:
        for _ in generator.start(geometry, [Segment(0, text)], ZeroNoise()).blocks():
            pass
    return tracker.peak


def table(made: Sequence[Row]) -> str:
    return memory({"rows": [asdict(row) for row in made]})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=result_file)
    parser.add_argument("--videos", action="store_true", help="cache and activations of a video, for each policy")
    arguments = parser.parse_args(argv)
    planner = Planner(WAN_1_3B, VAE.published(torch.bfloat16), torch.bfloat16)
    if arguments.videos:
        for policy in ("full", "window", "packed", "prune"):
            whole, small = (video_bytes(planner, policy, size) for size in (480, SMALL))
            print(f"{policy:8}{format_bytes(whole):>12}, at {SMALL[0]}x{SMALL[1]} {format_bytes(small)}", flush=True)
        return 0
    made = rows(planner)
    given = " ".join(["benchmarks.memory", *(sys.argv[1:] if argv is None else argv)])
    content = {"device": "calculated, not measured", "torch": torch.__version__, "command": given}
    content |= {"rows": [asdict(row) for row in made]}
    print(table(made))
    store(content, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main, log_format=None))
