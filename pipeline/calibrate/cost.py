"""What recording a calibration takes, counted from sizes; its time, from how fast this machine multiplies."""

from __future__ import annotations

import time
from datetime import timedelta

import torch

from dummy.calibration.recorder import FLOAT, Pieces
from pipeline.calibrate.recording import Recording
from pipeline.config.config import geometry_of
from pipeline.planning.plan import Planner
from pipeline.runtime.inputs import GeneratorSettings
from utils.memory import format_bytes
from wan.config import ModelConfig
from wan.transformer.operations import forward_operations

MEASURED_S = 0.3
CPU_TOKENS = 64  # a block's would take a minute at 1080p, to no other result


def observed_operations(recording: Recording, sizes: ModelConfig, frames: int) -> float:
    """Added to a pass in which heads see `frames` frames, the block's own included, because it is watched: scores and
    values of the sampled queries, then every candidate's output and its square."""
    geometry, candidates = geometry_of(recording.config, sizes.in_dim), len(recording.candidates)
    a_query = 2 * frames * geometry.tokens_per_frame + candidates * (frames + sizes.head_dim)
    return 2.0 * min(recording.queries, geometry.tokens_per_block) * sizes.dim * sizes.num_layers * a_query


def operations(recording: Recording, sizes: ModelConfig) -> tuple[float, float]:
    """Of a video up to the last block that is recorded: its forwards, and what recording adds."""
    geometry, chosen = geometry_of(recording.config, sizes.in_dim), recording.passes
    seen = [(block + 1) * geometry.frames_per_block for block in range(chosen.blocks[-1] + 1)]
    heads = sizes.num_layers * sizes.num_heads
    forwards = sum(chosen.per_block * forward_operations(sizes, geometry, heads * frames) for frames in seen)
    added = sum(observed_operations(recording, sizes, seen[block]) for block in chosen.blocks)
    return forwards, added * len(chosen.passes)


def recorder_bytes(recording: Recording, sizes: ModelConfig) -> int:
    """The most that the recorder adds on the device: what it has at work at once, the sampled queries, and the products
    of the output projection."""
    geometry = geometry_of(recording.config, sizes.in_dim)
    frames = (recording.passes.blocks[-1] + 1) * geometry.frames_per_block
    tokens, candidates = geometry.tokens_per_frame, len(recording.candidates)
    pieces = Pieces.of(sizes.num_heads, sizes.head_dim, frames, tokens, candidates)
    grams = sizes.num_layers * sizes.num_heads * sizes.head_dim**2
    return pieces.bytes + FLOAT * (grams + 2 * sizes.dim * recording.queries)


def products_a_second(sizes: ModelConfig, tokens: int, device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of one linear layer of the model over a block (on a CPU a part of it), measured here."""
    tokens = tokens if device.type == "cuda" else min(tokens, CPU_TOKENS)
    x = torch.zeros(tokens, sizes.dim, device=device, dtype=dtype)
    weight = torch.zeros(sizes.dim, sizes.ffn_dim, device=device, dtype=dtype)

    def seconds(times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            x @ weight
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    seconds(1)
    times = max(1, min(1000, int(MEASURED_S / max(seconds(1), 1e-9))))
    return times * 2.0 * tokens * sizes.dim * sizes.ffn_dim / seconds(times)


def cost_lines(recording: Recording, sizes: ModelConfig, rate: float) -> list[str]:
    """Operations and time of a video and of all of them; `rate` in operations a second."""
    geometry, chosen = geometry_of(recording.config, sizes.in_dim), recording.passes
    forwards, added = operations(recording, sizes)
    frames = (chosen.blocks[-1] + 1) * geometry.frames_per_block
    plain = forward_operations(sizes, geometry, sizes.num_layers * sizes.num_heads * frames)
    times = 1 + observed_operations(recording, sizes, frames) / plain
    a_video = (forwards + added) / rate
    whole = timedelta(seconds=round(recording.videos * a_video))
    queries = min(recording.queries, geometry.tokens_per_block)
    return [
        f"Recorded: {recording.videos} videos, blocks {', '.join(map(str, chosen.blocks))}, passes "
        f"{', '.join(name for _, name in chosen.passes)}, {queries} of {geometry.tokens_per_block} queries, "
        f"{len(recording.candidates)} candidates",
        f"A video: {forwards / 1e12:.3g} TFLOP up to block {chosen.blocks[-1]}, and {added / 1e12:.3g} TFLOP of "
        f"recording; a recorded pass costs {times:.2f} times a plain one there",
        f"Time: about {a_video:.3g} s a video, {whole} in all, at the {rate / 1e12:.3g} TFLOP/s that a linear layer "
        "reaches here; attention is slower than that on most machines",
    ]


def memory_lines(recording: Recording, settings: GeneratorSettings, planner: Planner) -> list[str]:
    """Memory as tensors; nothing is decoded, so the VAE is not in it."""
    plan = planner.memory(recording.config, settings)
    extra = recorder_bytes(recording, planner.sizes)
    rows = [
        ("transformer weights", plan.transformer),
        ("text keys and values", plan.text),
        ("cache, full history", plan.cache.total),
        ("transformer activations, peak", plan.transformer_activations),
        ("recorder, at most", extra),
    ]
    lines = [f"  {name:40}{format_bytes(size):>12}" for name, size in rows]
    lines.append(f"  {'peak while videos are made':40}{format_bytes(sum(size for _, size in rows)):>12}")
    if plan.text_encoder:
        lines.append(f"  {'text encoder (freed before that)':40}{format_bytes(plan.text_encoder):>12}")
    return ["Memory, as tensors:", *lines]
