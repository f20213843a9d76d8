"""What fits into which card, as calculated: python -m benchmarks.memory [--json FILE]

For the 1.3B model in bf16 with packed heads, from the same plan as `--dry_run`: bytes of tensors, with a tenth of the
card left for libraries and the allocator. Nothing is loaded or measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.tables import memory
from dummy.config import DummyForcingConfig
from pipeline.config.config import InferenceConfig
from pipeline.planning.plan import RESERVE, Planner
from pipeline.runtime.decoding import DecodeStrategy
from pipeline.runtime.loading import generator_settings
from utils import command
from wan.config import WAN_1_3B, ModelKwargs
from wan.vae.vae import VAE

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
        plans = [(strategy, planner.memory(config, settings, strategy)) for strategy in planner.strategies(config)]
        for card in cards:
            room = card * 2**30 * (1 - RESERVE)
            fitting = [pair for pair in plans if pair[1].peak <= room]
            strategy, plan = fitting[0] if fitting else min(plans, key=lambda pair: pair[1].peak)
            sizes = plan.peak / 2**30, plan.vae_cache_on_host / 2**30
            made.append(Row(resolution, card, *sizes, bool(fitting), strategy))
    return made


def table(made: Sequence[Row]) -> str:
    return memory({"rows": [asdict(row) for row in made]})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    made = rows(Planner(WAN_1_3B, VAE.published(torch.bfloat16), torch.bfloat16))
    command = " ".join(["benchmarks.memory", *(sys.argv[1:] if argv is None else argv)])
    content = {"device": "calculated, not measured", "torch": torch.__version__, "command": command}
    content |= {"rows": [asdict(row) for row in made]}
    print(table(made))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main, log_format=None))
