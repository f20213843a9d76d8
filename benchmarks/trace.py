"""Where the time of a traced run goes, by kind of work: products, attentions, elementwise, copies, idle.

Reads what torch.profiler traced, as Chrome traces have it. On a GPU kernels are told apart by their names; which
attention one belongs to is known from the range that was open when it was launched, and is not known in a replayed
graph. On a CPU it is the operators' own time, with what they call taken off; idle is what is left: Python.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

import torch
from torch import Tensor

Inputs = ParamSpec("Inputs")


SELF, CROSS = "self-attention", "cross-attention"
KINDS = ("linear", SELF, CROSS, "attention", "elementwise", "copies", "idle")

Event = Mapping[str, Any]

# In this order: Triton's kernels are named after all that they join, attention kernels may have "gemm" in their names.
_NAMES = (
    ("linear", re.compile(r"^triton_tem")),
    ("elementwise", re.compile(r"^triton_")),
    ("attention", re.compile(r"flash|fmha|sdpa|attention|softmax", re.IGNORECASE)),
    (
        "linear",
        re.compile(r"gemm|gemv|nvjet|cublas|cutlass|splitk|aten::(linear|addmm|mm|bmm|baddbmm|_scaled_mm)", re.I),
    ),
    ("copies", re.compile(r"memcpy|memset|copy|catarray|aten::(cat|clone|contiguous|to|_to_copy)$", re.IGNORECASE)),
)
_LAUNCH = re.compile(r"(cuda|cu|hip)(ModuleLaunch|LaunchKernel|GraphLaunch|ExtLaunch)", re.IGNORECASE)
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in _NAMES if pattern.search(name)), "elementwise")


def labelled(label: str, attention: Callable[Inputs, Tensor]) -> Callable[Inputs, Tensor]:
    """The attention, in a range that a trace shows."""

    def in_range(*args: Inputs.args, **kwargs: Inputs.kwargs) -> Tensor:
        with torch.profiler.record_function(label):
            return attention(*args, **kwargs)

    return in_range


@dataclass(frozen=True)
class Breakdown:
    milliseconds: dict[str, float]  # by kind
    launches: int  # kernels and graphs that the host launched; on a CPU, operators
    kernels: int  # that ran on the device; on a CPU, operators


def traced(function: Callable[[], object], device: torch.device) -> Breakdown:
    """Run the function once under the profiler."""
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CPU, activity.CUDA] if device.type == "cuda" else [activity.CPU]
    with torch.profiler.profile(activities=kinds) as profile, torch.profiler.record_function("whole"):
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    return breakdown([event for event in events if event.get("ph") == "X"])


def breakdown(events: Sequence[Event]) -> Breakdown:
    """Of the complete events ("ph": "X", times in microseconds) of one run."""
    device = sorted((event for event in events if event.get("cat") in _DEVICE), key=_start)
    if device:
        launches = sum(bool(_LAUNCH.search(event["name"])) for event in events if event.get("cat") not in _DEVICE)
        return Breakdown(_on_device(device, events), launches, len(device))
    operators = [event for event in events if event.get("cat") in ("cpu_op", "user_annotation")]
    count = sum(event["name"].startswith("aten::") for event in operators)
    return Breakdown(_on_host(operators), count, count)


def _on_device(kernels: Sequence[Event], events: Iterable[Event]) -> dict[str, float]:
    ranges = [event for event in events if event.get("cat") == "gpu_user_annotation" and event["name"] in (SELF, CROSS)]
    spent = dict.fromkeys(KINDS, 0.0)
    free = _start(kernels[0])
    for event in kernels:
        kind = kind_of(event["name"])
        if kind == "attention":
            around = (r["name"] for r in ranges if _start(r) <= _start(event) <= _end(r))
            kind = next(around, kind)
        spent[kind] += event["dur"] / 1000
        spent["idle"] += max(0.0, _start(event) - free) / 1000
        free = max(free, _end(event))
    return spent


def _on_host(operators: Sequence[Event]) -> dict[str, float]:
    spent = dict.fromkeys(KINDS, 0.0)
    for event, own, around in _nested(operators):
        label = next((name for name in (*around, event["name"]) if name in (SELF, CROSS)), None)
        kind = kind_of(event["name"])
        if event["name"] == "whole":
            kind = "idle"
        elif label is not None and kind == "attention":
            kind = label
        spent[kind] += own / 1000
    return spent


def _nested(operators: Sequence[Event]) -> Iterator[tuple[Event, float, list[str]]]:
    """Every event with its own time, that of the events within it taken off, and the names of those around it."""
    own: dict[int, float] = {}
    around: dict[int, list[str]] = {}
    stacks: dict[object, list[int]] = {}
    order = sorted(range(len(operators)), key=lambda i: (_start(operators[i]), -operators[i]["dur"]))
    for index in order:
        event = operators[index]
        stack = stacks.setdefault(event.get("tid"), [])
        while stack and _end(operators[stack[-1]]) <= _start(event):
            stack.pop()
        own[index] = event["dur"]
        around[index] = [operators[i]["name"] for i in stack]
        if stack:
            own[stack[-1]] -= event["dur"]
        stack.append(index)
    return ((operators[index], own[index], around[index]) for index in order)


def _start(event: Event) -> float:
    return float(event["ts"])


def _end(event: Event) -> float:
    return float(event["ts"]) + float(event["dur"])
