"""One video on several processes: python -m benchmarks.scale [--ranks 1,2,4 --policy packed,full --layers 4 ...]

A steady block (four steps and the clean pass) of a model with random weights, by one process and by several, each with
one thread on a CPU or one GPU. Prints the ratio to one process, what was sent beside the formula, how even the load is,
and the share of the time that ranks wait in exchanges. With `--predict GB/s` also what a link of that speed would make
of one process's time: calculated, not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.arguments import multiple_of, result_file, some_of, store
from benchmarks.dit import BLOCK, LATENT_SIZES
from benchmarks.machine import facts, synchronise
from benchmarks.steady import POLICIES, STEPS, SteadyBlock, build_model, make_policy
from pipeline.planning.scale import block_bytes, scale_of, shares_of
from utils import command
from utils.distributed import World
from wan.attention.exchange import HeadExchange
from wan.config import WAN_1_3B, ModelConfig
from wan.geometry import LatentGeometry

MARK = "scale: "


class TimedExchange(HeadExchange):
    """Counts the seconds that a rank is in exchanges: with gloo, which does nothing meanwhile, those that it waits."""

    seconds = 0.0

    def _swap(self, received: Tensor, sent: Tensor, received_sizes: list[int], sent_sizes: list[int]) -> None:
        begin = time.perf_counter()
        super()._swap(received, sent, received_sizes, sent_sizes)
        self.seconds += time.perf_counter() - begin


def measure(sizes: ModelConfig, arguments: argparse.Namespace, policy: str) -> dict[str, object] | None:
    """On every rank; the first one gives the row."""
    world = World.from_environment()
    device = torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(device)
    command.end_at_once()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=world.rank, world_size=world.size)
    model = build_model(sizes, device)
    exchange = TimedExchange(world.rank, world.size)
    model.exchange = exchange if world.size > 1 else None
    block = SteadyBlock(model, LatentGeometry(*LATENT_SIZES[arguments.resolution], 21, BLOCK), policy)
    block.run()
    times, waits, sent = [], [], []
    for _ in range(arguments.repeat):
        block.prepare()
        dist.barrier()
        exchange.seconds, exchange.sent = 0.0, 0
        begin = time.perf_counter()
        block.run()
        synchronise(device)
        times.append(time.perf_counter() - begin)
        waits.append(exchange.seconds / times[-1])
        sent.append(exchange.sent)
    numbers = torch.tensor([statistics.median(waits), sent[-1], block.rollout.cache.bytes().kept], device=device)
    every = [torch.zeros_like(numbers) for _ in range(world.size)]
    dist.all_gather(every, numbers)
    dist.destroy_process_group()
    if world.rank:
        return None
    itemsize = model.dtype.itemsize
    policy_made = make_policy(policy, sizes, BLOCK)
    scale = scale_of(policy_made, sizes, block.geometry, world.size, len(STEPS), itemsize)
    shares = shares_of(policy_made, sizes, block.geometry, world.size)
    counted = block_bytes(shares, sizes, block.geometry, len(STEPS), itemsize) if world.size > 1 else [0]
    kept = [float(one[2]) for one in every]
    return {
        "policy": policy,
        "ranks": world.size,
        "block_ms": 1000 * statistics.median(times),
        "waiting": statistics.mean(float(one[0]) for one in every) if world.size > 1 else 0.0,
        "sent_bytes": sum(int(one[1]) for one in every),
        "formula_bytes": sum(counted),
        "balance": scale.balance,
        "largest_cache_share": max(kept) / max(sum(kept), 1.0),
    }


def run_ranks(ranks: int, policy: str, arguments: argparse.Namespace) -> dict[str, object]:
    """One row, measured by processes of their own."""
    options = ["--layers", arguments.layers, "--dim", arguments.dim, "--resolution", arguments.resolution]
    options += ["--repeat", arguments.repeat, "--policy", policy, "--worker"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    done = subprocess.run(
        [*launcher, "-m", "benchmarks.scale", *map(str, options)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    row: dict[str, object] = json.loads(line.removeprefix(MARK))
    return row


def table(rows: Sequence[dict[str, object]], link: float | None) -> str:
    """As Markdown."""
    heads = ["policy", "processes", "ms a block", "against one", "of the ideal", "waiting", "MB sent (formula)"]
    heads += ["balance", "largest part of the cache"] + (["calculated ms at the link"] if link else [])
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    alone = {row["policy"]: float(str(row["block_ms"])) for row in rows if row["ranks"] == 1}
    for row in rows:
        ranks, took = int(str(row["ranks"])), float(str(row["block_ms"]))
        first = alone.get(row["policy"])
        ratio = "-" if first is None else f"{first / took:.2f}"
        ideal = "-" if first is None else f"{100 * first / took / ranks:.0f} %"
        sent, formula = (float(str(row[name])) / 1e6 for name in ("sent_bytes", "formula_bytes"))
        cells = [
            str(row["policy"]),
            str(ranks),
            f"{took:.0f}",
            ratio,
            ideal,
            f"{100 * float(str(row['waiting'])):.0f} %",
        ]
        cells += [f"{sent:.1f} ({formula:.1f})", f"{float(str(row['balance'])):.2f}"]
        cells += [f"{100 * float(str(row['largest_cache_share'])):.0f} %"]
        if link:
            time_alone = first or took
            cells += [f"{time_alone * float(str(row['balance'])) / ranks + 1000 * formula * 1e6 / ranks / link:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--ranks", type=lambda text: [command.count(one) for one in text.split(",")], default=[1, 2, 4])
    parser.add_argument("--policy", type=some_of(POLICIES), default="packed,full", help=", ".join(POLICIES))
    parser.add_argument("--resolution", default="480", choices=LATENT_SIZES)
    parser.add_argument("--layers", type=command.count, default=4)
    parser.add_argument("--dim", type=multiple_of(WAN_1_3B.head_dim), default=WAN_1_3B.dim)
    parser.add_argument("--repeat", type=command.count, default=3)
    parser.add_argument("--predict", type=float, metavar="GB/s", help="of one GPU, in one direction")
    parser.add_argument("--json", type=result_file)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    heads = arguments.dim // WAN_1_3B.head_dim
    sizes = ModelConfig(
        dim=arguments.dim, ffn_dim=arguments.dim * 35 // 6, num_heads=heads, num_layers=arguments.layers
    )
    if arguments.worker:
        row = measure(sizes, arguments, arguments.policy)
        if row is not None:
            print(MARK + json.dumps(row), flush=True)
        return 0
    rows = [run_ranks(ranks, policy, arguments) for policy in arguments.policy.split(",") for ranks in arguments.ranks]
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    print(table(rows, None if arguments.predict is None else arguments.predict * 1e9))
    about = facts(device, ["benchmarks.scale", *(sys.argv[1:] if argv is None else argv)])
    store({**about, "rows": rows}, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main, log_format=None))
