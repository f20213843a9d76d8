"""What each context policy costs in a steady block, measured and as counted operations predict.

    python -m benchmarks.policies [--dim 384 --layers 8 --frames 21 --repeat 1 --json FILE]

A mid-size model with random weights at 480p. The cache is filled as it is before the last but one block of a video,
then that block is made as the generator makes it: four steps and the clean pass. Every policy runs on the same engine
in the same process; what counts are the ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks.counting import clean_pass_operations, forward_operations
from dummy.config import DummyForcingConfig
from dummy.policy import ContextPolicy, policy_from_config
from dummy.roles import HeadRoles
from pipeline.generator import BlockGenerator, GeneratorSettings, Rollout, Segment
from pipeline.plan import assumed_roles
from pipeline.schedule import DenoisingSchedule
from utils.profiler import device_name
from utils.seed import NoiseStream
from wan.attention import attention_backend
from wan.config import ModelConfig, ModelKwargs
from wan.geometry import LatentGeometry
from wan.model import CausalWanModel, TextContext

POLICIES = ("full", "window", "prune", "packed")
STEPS = (1000, 750, 500, 250)


@dataclass(frozen=True)
class Row:
    policy: str
    frames_per_head: float  # visible, the block's own included
    block_ms: float
    operations: float
    speedup: float = 1.0
    predicted: float = 1.0


def build_model(arguments: argparse.Namespace, device: torch.device) -> CausalWanModel:
    dim = arguments.dim
    config = ModelConfig(dim=dim, ffn_dim=dim * 35 // 6, num_heads=dim // 64, num_layers=arguments.layers)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with device:
        model = CausalWanModel(config).to(dtype).random_()
    model.attention = attention_backend("auto", device, dtype)
    return model


def make_policy(name: str, model: CausalWanModel, block: int) -> ContextPolicy:
    """Policies of the published settings; half of the heads dummy, the others sink and neighbour in equal parts."""
    enabled = name in ("prune", "packed")
    num_dummy = model.config.num_layers * model.config.num_heads // 2
    dummy = DummyForcingConfig(enabled, name if name == "prune" else "packed", num_dummy=num_dummy)
    window = ModelKwargs(local_attn_size=12 if name == "window" else -1, sink_size=3 if name == "window" else 0)
    policy = policy_from_config(window, dummy, block)
    if policy.split is None:
        return policy
    roles: HeadRoles = assumed_roles(model.config, policy.split)
    return policy_from_config(window, dummy, block, roles)


def fill(rollout: Rollout, model: CausalWanModel, geometry: LatentGeometry, past: int) -> None:
    """Random keys and values for the first `past` frames, block by block as a video would leave them."""
    generator = torch.Generator(model.device).manual_seed(0)
    shape = (1, geometry.tokens_per_block, model.config.num_heads, model.config.head_dim)
    for start in range(0, past, geometry.frames_per_block):
        frames = range(start, start + geometry.frames_per_block)
        for layer in rollout.cache.layers:
            k, v = (torch.randn(shape, generator=generator, device=model.device).to(model.dtype) for _ in "kv")
            layer.commit(k, v, frames)


def measure(name: str, model: CausalWanModel, geometry: LatentGeometry, repeat: int) -> Row:
    settings = GeneratorSettings(
        DenoisingSchedule.build(STEPS, 5.0, warp=True), make_policy(name, model, geometry.frames_per_block)
    )
    made = BlockGenerator(model, settings)
    with torch.inference_mode():
        text = model.encode_text(torch.zeros(1, model.config.text_len, model.config.text_dim))
        times = []
        for _ in range(repeat):
            rollout = made.start(geometry, [Segment(0, text)], NoiseStream([0]))
            start = geometry.num_frames - 2 * geometry.frames_per_block
            fill(rollout, model, geometry, start)
            groups = [group for layer in rollout.cache.layers for group in layer.groups]
            frames = sum((len(g.frames) + geometry.frames_per_block) * (g.heads.stop - g.heads.start) for g in groups)
            times.append(_timed(rollout, text, start, geometry))
    operations = len(STEPS) * forward_operations(model.config, geometry, frames)
    operations += clean_pass_operations(model.config, geometry, frames)
    all_heads = model.config.num_layers * model.config.num_heads
    return Row(name, frames / all_heads, statistics.median(times), operations)


def _timed(rollout: Rollout, text: TextContext, start: int, geometry: LatentGeometry) -> float:
    """Milliseconds of the block at frame `start`, its clean pass included."""
    device = rollout.cache.device
    begin = time.perf_counter()
    latents = rollout.denoise(text, start)
    rollout.clean_pass(latents, text, start, start // geometry.frames_per_block)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) * 1000


def compare(rows: Sequence[Row]) -> list[Row]:
    """The rows with their speed-up over the first, measured and as the counted operations predict."""
    base = rows[0]
    return [replace(r, speedup=base.block_ms / r.block_ms, predicted=base.operations / r.operations) for r in rows]


def table(rows: Sequence[Row]) -> list[str]:
    names = ("policy", "frames/head", "ms/block", "TFLOP", "speed-up", "predicted", "reached")
    lines = ["{:8}{:>12}{:>12}{:>9}{:>10}{:>11}{:>9}".format(*names)]
    for r in rows:
        reached = f"{100 * r.speedup / r.predicted:.0f}%"
        lines.append(
            f"{r.policy:8}{r.frames_per_head:12.2f}{r.block_ms:12.1f}{r.operations / 1e12:9.3f}{r.speedup:10.2f}"
            f"{r.predicted:11.2f}{reached:>9}"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--frames", type=int, default=21, help="latent frames of the video")
    parser.add_argument("--size", type=int, nargs=2, default=(60, 104), help="latent height and width (480p: 60 104)")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    model = build_model(arguments, device)
    geometry = LatentGeometry(*arguments.size, arguments.frames, 3)
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}, {model.dtype}")
    print(
        f"{arguments.layers} layers of {arguments.dim}, {geometry.tokens_per_frame} tokens a frame, 4 steps, clean pass"
    )
    rows = compare([measure(name, model, geometry, arguments.repeat) for name in arguments.policies.split(",")])
    print("\n".join(table(rows)))
    if arguments.json is not None:
        facts = {"device": device_name(device), "torch": torch.__version__, "python": platform.python_version()}
        rows_out = [asdict(row) for row in rows]
        arguments.json.write_text(json.dumps({**facts, "command": sys.argv, "rows": rows_out}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
