"""What each context policy costs in a steady block, measured and as counted operations predict.

    python -m benchmarks.policies [--dim 384 --layers 8 --frames 21 --repeat 1 --json FILE]

A mid-size model with random weights at 480p. The cache is filled as it is before the last but one block of a video,
then that block is made as the generator makes it: four steps and the clean pass. Where heads keep more frames than come
before that block, as in `long`, the video is longer. Every policy runs on the same engine in the same process; what
counts are the ratios.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

from benchmarks.arguments import device_here, multiple_of, result_file, some_of, store
from benchmarks.steady import POLICIES, SteadyBlock, build_model
from utils import command
from utils.profiler import device_name
from wan.config import ModelConfig
from wan.geometry import LatentGeometry
from wan.transformer.model import CausalWanModel


@dataclass(frozen=True)
class Row:
    policy: str
    frames_per_head: float  # visible, the block's own included
    block_ms: float
    operations: float
    speedup: float = 1.0
    predicted: float = 1.0


def measure(policy: str, model: CausalWanModel, geometry: LatentGeometry, repeat: int) -> Row:
    block = SteadyBlock(model, geometry, policy)
    heads = model.config.num_layers * model.config.num_heads
    block.flow()  # so that new memory is touched and kernels are chosen before the clock starts
    least = min(block.time_ms()[0] for _ in range(repeat))  # other work on the machine only adds to it
    return Row(policy, block.head_frames / heads, least, block.operations)


def compare(rows: Sequence[Row]) -> list[Row]:
    """The rows with their speed-up over the first, measured and as the counted operations predict."""
    base = rows[0]
    return [replace(r, speedup=base.block_ms / r.block_ms, predicted=base.operations / r.operations) for r in rows]


def table(rows: Sequence[Row]) -> list[str]:
    names = ("policy", "frames/head", "ms/block", "TFLOP", "speed-up", "predicted", "reached")
    lines = ["{:11}{:>12}{:>12}{:>9}{:>10}{:>11}{:>9}".format(*names)]
    for r in rows:
        reached = f"{100 * r.speedup / r.predicted:.0f}%"
        lines.append(
            f"{r.policy:11}{r.frames_per_head:12.2f}{r.block_ms:12.1f}{r.operations / 1e12:9.3f}{r.speedup:10.2f}"
            f"{r.predicted:11.2f}{reached:>9}"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=multiple_of(64), default=384)
    parser.add_argument("--layers", type=command.count, default=8)
    parser.add_argument("--frames", type=command.count, default=21, help="latent frames of the video")
    parser.add_argument(
        "--size", type=command.count, nargs=2, default=(60, 104), help="latent height and width (480p: 60 104)"
    )
    parser.add_argument("--policies", type=some_of(POLICIES), default=",".join(POLICIES))
    parser.add_argument("--repeat", type=command.count, default=1)
    parser.add_argument("--device", type=device_here, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=result_file, help="write the rows here, too")
    arguments = parser.parse_args(argv)
    device: torch.device = arguments.device
    dim = arguments.dim
    config = ModelConfig(dim=dim, ffn_dim=dim * 35 // 6, num_heads=dim // 64, num_layers=arguments.layers)
    model = build_model(config, device)
    height, width = arguments.size
    geometry = LatentGeometry(height, width, arguments.frames, 3)
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}, {model.dtype}")
    print(
        f"{arguments.layers} layers of {arguments.dim}, {geometry.tokens_per_frame} tokens a frame, 4 steps, clean pass"
    )
    rows = compare([measure(name, model, geometry, arguments.repeat) for name in arguments.policies.split(",")])
    print("\n".join(table(rows)))
    where = f"{device_name(device)}, {torch.get_num_threads()} threads"
    given = " ".join(["benchmarks.policies", *(sys.argv[1:] if argv is None else argv)])
    facts = {"device": where, "torch": torch.__version__, "command": given}
    store({**facts, "rows": [asdict(row) for row in rows]}, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main, log_format=None))
