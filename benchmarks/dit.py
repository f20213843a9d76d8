"""Steady blocks of the full-size transformer: python -m benchmarks.dit [--resolution 480,720 --policy packed,full ...]

Random weights of the full size, a full cache, four steps and the clean pass, as the generator runs them; no checkpoint,
no text encoder, no VAE, no file. The two ceilings of the machine, a large product and a large copy, are measured in the
same run. On a CPU the model is reduced (`--layers`, `--dim`), and only ratios mean something. Rows are stored as they
come, so that what was measured is kept if a later row fails.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import get_args

import torch
from torch import Tensor

from benchmarks.arguments import device_here, multiple_of, result_file, some_of, store
from benchmarks.machine import ceilings, facts
from benchmarks.steady import POLICIES, SteadyBlock, build_model
from benchmarks.tables import compared, predicted
from benchmarks.trace import CROSS, KINDS, SELF, Breakdown, labelled, traced
from pipeline.runtime.engine import WAYS, passes_of
from pipeline.runtime.inputs import Passes
from utils import command
from utils.errors import InputError
from wan.attention.backends import AttentionName, choose_backend
from wan.config import WAN_1_3B, ModelConfig
from wan.geometry import LatentGeometry, pixel_frames
from wan.transformer.fp8 import to_fp8
from wan.transformer.model import CausalWanModel

LATENT_SIZES = {"480": (60, 104), "720": (90, 160), "1080": (136, 240), "tiny": (8, 12)}
BLOCK = 3


@dataclass(frozen=True)
class Row:
    resolution: str
    policy: str
    engine: str
    attention: str
    precision: str
    error: float | None  # of a flow, relative to the first row's with another precision and all else equal
    frames_per_head: float
    block_ms: float  # median
    fps: float  # pixel frames of a block over its time, without the VAE
    operations: float
    tflops: float
    share: float  # of the ceiling for products, measured in the same run
    host_ms: float  # until the host had queued everything
    launches: int  # kernels and graphs that the host launched (on a CPU: operators)
    kernels: int
    cache_bytes: int
    peak_bytes: int
    reserved_bytes: int  # by the allocator, with what captured passes have for themselves
    ms_by_kind: dict[str, float] | None = None


@dataclass(frozen=True)
class Subject:
    """What a row is measured of."""

    model: CausalWanModel
    passes: Passes
    engine: str
    attention: str
    precision: str
    resolution: str
    policy: str

    @property
    def place(self) -> tuple[str, str, str]:
        """What the precision does not change."""
        return self.resolution, self.policy, self.attention

    def block(self) -> SteadyBlock:
        return SteadyBlock(
            self.model, LatentGeometry(*LATENT_SIZES[self.resolution], 21, BLOCK), self.policy, self.passes
        )


References = dict[tuple[str, str, str], tuple[str, Tensor]]
"""By `Subject.place`: the precision measured first, and the flow that it gave."""


def precision_error(subject: Subject, flow: Tensor, references: References) -> float | None:
    precision, reference = references.setdefault(subject.place, (subject.precision, flow))
    if precision == subject.precision:
        return None
    return float((flow - reference).norm() / reference.norm())


def measure(subject: Subject, ceiling: float, repeat: int, profile: bool, references: References) -> Row:
    device = subject.model.device
    block = subject.block()
    block.run()  # compiles, records, and warms up
    error = precision_error(subject, block.flow(), references)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = [block.time_ms() for _ in range(repeat)]
    cuda = device.type == "cuda"
    peak, reserved = (
        (torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)) if cuda else (0, 0)
    )
    milliseconds = statistics.median(total for total, _ in times)
    operations, head_frames = block.operations, block.head_frames
    cache_bytes = block.rollout.cache.bytes().total
    del block  # its cache has to make room for that of the traced one
    seen = look_inside(subject)
    tflops = operations / milliseconds / 1e9
    return Row(
        resolution=subject.resolution,
        policy=subject.policy,
        engine=subject.engine,
        attention=subject.attention,
        precision=subject.precision,
        error=error,
        frames_per_head=head_frames / (subject.model.config.num_layers * subject.model.config.num_heads),
        block_ms=milliseconds,
        fps=pixel_frames(BLOCK, first=False) / milliseconds * 1000,
        operations=operations,
        tflops=tflops,
        share=tflops / ceiling,
        host_ms=statistics.median(host for _, host in times),
        launches=seen.launches,
        kernels=seen.kernels,
        cache_bytes=cache_bytes,
        peak_bytes=peak,
        reserved_bytes=reserved,
        ms_by_kind=seen.milliseconds if profile else None,
    )


def look_inside(subject: Subject) -> Breakdown:
    """One traced block, with ranges around the attentions."""
    model, attention, ragged = subject.model, subject.model.attention, subject.model.ragged
    model.attention = labelled(SELF, attention)
    model.ragged = None if ragged is None else labelled(SELF, ragged)
    block = subject.block()  # its cache takes the attention that the model has now
    model.attention = labelled(CROSS, attention)
    try:
        if WAYS[subject.engine][1]:
            block.run()  # passes over this block's cache have to be recorded first
            block.prepare()
        return traced(block.run, model.device)
    finally:
        model.attention, model.ragged = attention, ragged


def table(rows: Sequence[Row]) -> list[str]:
    names = ("rows", "policy", "engine", "attention", "type", "frames/head", "ms/block", "FPS", "TFLOP/s", "share")
    lines = [
        "{:6}{:11}{:10}{:10}{:5}{:>12}{:>10}{:>8}{:>9}{:>7}{:>9}{:>10}{:>9}{:>9}".format(
            *names, "host ms", "launches", "GiB peak", "reserved"
        )
    ]
    lines += [
        f"{r.resolution:6}{r.policy:11}{r.engine:10}{r.attention:10}{r.precision:5}{r.frames_per_head:12.2f}{r.block_ms:10.1f}{r.fps:8.2f}"
        f"{r.tflops:9.2f}{100 * r.share:6.0f}%{r.host_ms:9.1f}{r.launches:10d}{r.peak_bytes / 2**30:9.2f}"
        f"{r.reserved_bytes / 2**30:9.2f}"
        for r in rows
    ]
    return lines


def kinds_table(rows: Sequence[Row]) -> list[str]:
    """Milliseconds of a block by kind of work, of the rows that have them."""
    profiled = [(row, row.ms_by_kind) for row in rows if row.ms_by_kind is not None]
    if not profiled:
        return []
    lines = ["ms by kind".ljust(37) + "".join(f"{kind:>17}" for kind in KINDS)]
    for row, spent in profiled:
        name = f"{row.resolution:6}{row.policy:11}{row.engine:10}{row.attention:10}"
        lines.append(name + "".join(f"{spent[kind]:17.1f}" for kind in KINDS))
    return lines


def ratios(rows: Sequence[Row]) -> list[str]:
    """Engines against the first at the same policy; policies against full history, beside what operations predict."""
    lines = []
    every = [asdict(row) for row in rows]
    for row in every:
        engine, full = compared(every, row)
        rows_of, policy, mine = row["resolution"], row["policy"], row["engine"]
        if engine is not None:
            ratio = engine["block_ms"] / row["block_ms"]
            lines.append(f"{rows_of} {policy}: {mine} is {ratio:.2f} times as fast as {engine['engine']}")
        if full is not None:
            ratio, expected = full["block_ms"] / row["block_ms"], predicted(full, row)
            lines.append(
                f"{rows_of} {mine}: {policy} is {ratio:.2f} times as fast as full, operations predict "
                f"{expected:.2f} ({100 * ratio / expected:.0f}%)"
            )
        if row["error"] is not None:
            lines.append(f"{rows_of} {policy} {mine}: {row['precision']} is off by {row['error']:.2%}")
    return [*lines, *lengths_cost(rows)]


def lengths_cost(rows: Sequence[Row]) -> list[str]:
    """What many different lengths cost: a calibrated table against packed heads, by the same engine and attention."""

    def place(row: Row) -> tuple[str, ...]:
        return row.resolution, row.engine, row.attention, row.precision

    packed = {place(row): row for row in rows if row.policy == "packed"}
    return [
        f"{row.resolution} {row.engine}, {row.attention}: calibrated {row.block_ms:.1f} ms and {row.launches} launches "
        f"with {row.frames_per_head:.2f} frames a head, packed {packed[place(row)].block_ms:.1f} ms and "
        f"{packed[place(row)].launches} with {packed[place(row)].frames_per_head:.2f}"
        for row in rows
        if row.policy == "calibrated" and place(row) in packed
    ]


def model_config(arguments: argparse.Namespace, device: torch.device) -> ModelConfig:
    if device.type == "cuda" and arguments.layers is None and arguments.dim is None:
        return WAN_1_3B
    dim, layers = arguments.dim or 384, arguments.layers or 2
    return ModelConfig(dim=dim, ffn_dim=dim * 35 // 6, num_heads=dim // 64, num_layers=layers)


def subjects(arguments: argparse.Namespace, config: ModelConfig, device: torch.device) -> Iterator[Subject]:
    """What the arguments ask for; an attention that cannot run here is left out with a line."""
    names = ("precision", "engine", "attention", "resolution", "policy")
    precisions, engines, attentions, resolutions, policies = (getattr(arguments, n).split(",") for n in names)
    for precision in precisions:
        model = build_model(config, device)
        if precision == "fp8":
            to_fp8(model)
        kind = "fp8" if precision == "fp8" else {torch.float32: "fp32", torch.bfloat16: "bf16"}[model.dtype]
        for engine, name in product(engines, attentions):
            passes = passes_of(model, engine)
            try:
                model.use_attention(name)
            except InputError as error:
                print(f"left out: {error}", flush=True)
                continue
            chosen: AttentionName = choose_backend(device, model.dtype) if name == "auto" else name
            for resolution, policy in product(resolutions, policies):
                yield Subject(model, passes, engine, chosen, kind, resolution, policy)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", type=device_here, default="cuda" if cuda else "cpu")
    sizes, ways, attentions, precisions = map(some_of, (LATENT_SIZES, WAYS, get_args(AttentionName), ("auto", "fp8")))
    parser.add_argument(
        "--resolution", type=sizes, default="480", help=f"of {', '.join(LATENT_SIZES)}, separated by commas"
    )
    parser.add_argument("--policy", type=some_of(POLICIES), default=",".join(POLICIES))
    parser.add_argument("--engine", type=ways, default="eager,compiled", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--attention", type=attentions, default="auto", help=f"of {', '.join(get_args(AttentionName))}")
    parser.add_argument(
        "--precision", type=precisions, default="auto", help="of auto (bf16, on a CPU fp32) and fp8; the first compares"
    )
    parser.add_argument("--repeat", type=command.count, default=5)
    parser.add_argument("--layers", type=command.count, help="of a reduced model")
    parser.add_argument("--dim", type=multiple_of(64), help="of a reduced model, a multiple of 64")
    parser.add_argument("--profile", action="store_true", help="where the time goes, by kind of work")
    parser.add_argument("--json", type=result_file, help="store the rows here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    device: torch.device = arguments.device
    config = model_config(arguments, device)
    ceiling = ceilings(device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    given = ["benchmarks.dit", *(sys.argv[1:] if argv is None else argv)]
    content = {**facts(device, given), "layers": config.num_layers, "dim": config.dim, "ceilings": ceiling}
    print("\n".join(f"{name}: {value}" for name, value in content.items()))
    rows: list[Row] = []
    references: References = {}
    for subject in subjects(arguments, config, device):
        rows.append(measure(subject, ceiling["product_tflops"], arguments.repeat, arguments.profile, references))
        print("\n".join(table(rows) if len(rows) == 1 else table(rows)[-1:]), flush=True)
        store({**content, "rows": [asdict(row) for row in rows]}, arguments.json)
    print("\n".join([*kinds_table(rows), *ratios(rows)]))
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main, log_format=None))
