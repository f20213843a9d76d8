"""Steady blocks of the full-size transformer: python -m benchmarks.dit [--resolution 480,720 --policy packed,full ...]

Random weights of the full size, a full cache, four steps and the clean pass, as the generator runs them; no checkpoint,
no text encoder, no VAE, no file. The two ceilings of the machine, a large product and a large copy, are measured in the
same run. On a CPU the model is reduced (`--layers`, `--dim`), and only ratios mean something.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.steady import POLICIES, SteadyBlock, build_model
from utils.profiler import device_name
from wan.config import WAN_1_3B, ModelConfig
from wan.geometry import LatentGeometry, pixel_frames
from wan.model import CausalWanModel

LATENT_SIZES = {"480": (60, 104), "720": (90, 160), "1080": (136, 240)}
BLOCK = 3


@dataclass(frozen=True)
class Row:
    resolution: str
    policy: str
    engine: str
    frames_per_head: float
    block_ms: float  # median
    fps: float  # pixel frames of a block over its time, without the VAE
    tflops: float
    share: float  # of the ceiling for products, measured in the same run
    host_ms: float  # until the host had queued everything
    launches: int  # kernels (on a CPU: operators)
    cache_bytes: int
    peak_bytes: int


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: torch.device, repeat: int = 10) -> float:
    """Median time of one call, warm."""
    function()
    times = []
    for _ in range(repeat):
        synchronise(device)
        begin = time.perf_counter()
        function()
        synchronise(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """TFLOP/s of a large square product, TB/s of a large copy (bytes read and written)."""
    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in "ab")
    product = seconds(lambda: a @ b, device)
    source = torch.empty((1 << 30) if device.type == "cuda" else (1 << 27), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = seconds(lambda: target.copy_(source), device)
    return {"product_tflops": 2 * side**3 / product / 1e12, "copy_tbps": 2 * source.nbytes / copy / 1e12}


def count_launches(block: SteadyBlock, device: torch.device) -> int:
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CPU, activity.CUDA] if device.type == "cuda" else [activity.CPU]
    with torch.profiler.profile(activities=kinds) as profile:
        block.run()
        synchronise(device)
    events = profile.events() or []
    if device.type == "cuda":
        return sum(event.name in ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel") for event in events)
    return sum(event.name.startswith("aten::") for event in events)


def measure(model: CausalWanModel, resolution: str, policy: str, engine: str, ceiling: float, repeat: int) -> Row:
    device = model.device
    geometry = LatentGeometry(*LATENT_SIZES[resolution], 21, BLOCK)
    block = SteadyBlock(model, geometry, policy)
    block.run()  # compiles, and warms up
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = [block.time_ms() for _ in range(repeat)]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    block.rollout = block.prepare()
    milliseconds = statistics.median(total for total, _ in times)
    tflops = block.operations / milliseconds / 1e9
    heads = model.config.num_layers * model.config.num_heads
    return Row(
        resolution=resolution,
        policy=policy,
        engine=engine,
        frames_per_head=block.head_frames / heads,
        block_ms=milliseconds,
        fps=pixel_frames(BLOCK, first=False) / milliseconds * 1000,
        tflops=tflops,
        share=tflops / ceiling,
        host_ms=statistics.median(host for _, host in times),
        launches=count_launches(block, device),
        cache_bytes=block.rollout.cache.bytes().total,
        peak_bytes=peak,
    )


def table(rows: Sequence[Row]) -> list[str]:
    names = ("rows", "policy", "engine", "frames/head", "ms/block", "FPS", "TFLOP/s", "share", "host ms", "launches")
    lines = ["{:5} {:8}{:10}{:>12}{:>10}{:>8}{:>9}{:>7}{:>9}{:>10}".format(*names)]
    lines += [
        f"{r.resolution:5} {r.policy:8}{r.engine:10}{r.frames_per_head:12.2f}{r.block_ms:10.1f}{r.fps:8.2f}"
        f"{r.tflops:9.2f}{100 * r.share:6.0f}%{r.host_ms:9.1f}{r.launches:10d}"
        for r in rows
    ]
    return lines


def facts(device: torch.device, ceiling: dict[str, float]) -> dict[str, object]:
    """What a stored result must say about where it was measured."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    driver = torch.version.cuda if device.type == "cuda" else None
    where = {"device": device_name(device), "cuda": driver, "torch": torch.__version__, "commit": commit}
    return {**where, "threads": torch.get_num_threads(), "command": sys.argv, "ceilings": ceiling}


def model_config(arguments: argparse.Namespace, device: torch.device) -> ModelConfig:
    if device.type == "cuda" and arguments.layers is None and arguments.dim is None:
        return WAN_1_3B
    dim, layers = arguments.dim or 384, arguments.layers or 2
    return ModelConfig(dim=dim, ffn_dim=dim * 35 // 6, num_heads=dim // 64, num_layers=layers)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resolution", default="480")
    parser.add_argument("--policy", default=",".join(POLICIES))
    parser.add_argument("--engine", default="eager,compiled")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dim", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    config = model_config(arguments, device)
    ceiling = ceilings(device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    print(f"{device_name(device)}, torch {torch.__version__}, {config.num_layers} layers of {config.dim}")
    print(f"ceilings: {ceiling['product_tflops']:.2f} TFLOP/s (product), {ceiling['copy_tbps']:.3f} TB/s (copy)")
    rows = []
    for engine in arguments.engine.split(","):
        model = build_model(config, device, engine, arguments.attention)
        for resolution in arguments.resolution.split(","):
            for policy in arguments.policy.split(","):
                row = measure(model, resolution, policy, engine, ceiling["product_tflops"], arguments.repeat)
                rows.append(row)
                print(table([row])[1], flush=True)
    print("\n".join(table(rows)))
    if arguments.json is not None:
        content = {**facts(device, ceiling), "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
