"""What a benchmark says of the machine: its name and versions, and the two ceilings, measured in the same run."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from utils.profiler import device_name


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: torch.device, repeat: int = 10) -> float:
    """Median time of one call, warm; on a GPU between events of the device."""
    function()
    return statistics.median(elapsed(function, device)[0] for _ in range(repeat))


def elapsed(function: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds of one call on an idle device: until the device is done, and until the host is."""
    synchronise(device)
    if device.type != "cuda":
        begin = time.perf_counter()
        function()
        host = time.perf_counter() - begin
        return host, host
    event = partial(torch.cuda.Event, enable_timing=True)
    first, last = event(), event()
    first.record()
    begin = time.perf_counter()
    function()
    host = time.perf_counter() - begin
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000, host


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """TFLOP/s of a large square product of random numbers, TB/s of a large copy (bytes read and written)."""
    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in "ab")
    product = seconds(lambda: a @ b, device)
    source = torch.ones((1 << 30) if device.type == "cuda" else (1 << 27), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = seconds(lambda: target.copy_(source), device)
    return {"product_tflops": 2 * side**3 / product / 1e12, "copy_tbps": 2 * source.nbytes / copy / 1e12}


def facts(device: torch.device, command: Sequence[str]) -> dict[str, object]:
    """What a stored result must say about where and how it was measured."""
    where = {"device": device_name(device), "torch": torch.__version__, "commit": _output("git", "rev-parse", "HEAD")}
    if device.type == "cuda":
        where["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        where["cuda"] = torch.version.cuda or torch.version.hip or ""
    return {**where, "threads": torch.get_num_threads(), "command": " ".join(command)}


def _output(*command: str) -> str:
    """The first line that a program prints; empty where there is no such program or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.partition("\n")[0].strip()
