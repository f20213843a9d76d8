"""What recording an atlas takes beside the run itself, counted from sizes alone: no file is needed."""

from __future__ import annotations

import torch

from dummy.frame_attention import PIECE_BYTES, sampled
from pipeline.atlas.recording import Recording, watched_policy
from pipeline.config.config import geometry_of
from pipeline.runtime.loading import choose_dtype
from utils.memory import format_bytes
from wan.config import ModelConfig
from wan.transformer.operations import forward_operations

PLACE = 8  # bytes of an index
FLOAT = 4  # bytes; scores and what is kept of them are float32 whatever the model computes in


def seen_frames(recording: Recording) -> list[int]:
    """Frames that heads see in each block up to the last that is recorded, the block's own included."""
    retention = watched_policy(recording.config, recording.context).initial
    own = recording.config.num_frame_per_block
    return [min(block * own, retention.total) + own for block in range(recording.passes.blocks[-1] + 1)]


def scoring_bytes(recording: Recording, sizes: ModelConfig, device: torch.device) -> int:
    """The most that a recorded pass adds to what is there, as bytes of tensors on the `device`.

    Beside what is kept of the video's earlier passes: the sampled queries; of one piece of them the scores, the shares
    and their sums, and those of the piece before, which stay until others take their place; on a CPU, queries and keys
    in float32 where they are not in it already (a GPU multiplies them as they are).
    """
    geometry, dtype = geometry_of(recording.config, sizes.in_dim), choose_dtype(recording.config, device)
    queries = sampled(geometry.tokens_per_block, recording.query_share, most=None)
    frames = max(seen_frames(recording))
    keys = frames * geometry.tokens_per_frame
    at_a_time = min(queries, max(1, PIECE_BYTES // (FLOAT * keys * sizes.num_heads)))
    scores, sums = (FLOAT * at_a_time * number * sizes.num_heads for number in (keys, frames))
    before = 2 * scores if at_a_time < queries else 0
    converted = FLOAT * (at_a_time + keys) * sizes.dim if device.type == "cpu" and dtype != torch.float32 else 0
    at_work = max(before + scores + converted, 2 * scores + 3 * sums)
    return dtype.itemsize * queries * sizes.dim + at_work + video_bytes(recording, sizes)


def video_bytes(recording: Recording, sizes: ModelConfig) -> int:
    """What is kept of a video: of each recorded pass the share of every frame and the entropy, for each head, and the
    places of the sampled queries."""
    seen, passes = seen_frames(recording), len(recording.passes.passes)
    numbers = sum(seen[block] + 1 for block in recording.passes.blocks) * passes
    queries = sampled(geometry_of(recording.config, sizes.in_dim).tokens_per_block, recording.query_share, most=None)
    places = queries * len(recording.passes.blocks) * passes
    return FLOAT * numbers * sizes.num_layers * sizes.num_heads + PLACE * places


def cost_lines(recording: Recording, sizes: ModelConfig, device: torch.device) -> list[str]:
    """A video's forwards, what recording adds to them, and the memory that this takes at most."""
    geometry, chosen, seen = geometry_of(recording.config, sizes.in_dim), recording.passes, seen_frames(recording)
    heads = sizes.num_layers * sizes.num_heads
    forwards = sum(chosen.per_block * forward_operations(sizes, geometry, heads * frames) for frames in seen)
    queries = sampled(geometry.tokens_per_block, recording.query_share, most=None)
    frames = sum(seen[block] for block in chosen.blocks) * len(chosen.passes)
    scores = 2 * queries * frames * geometry.tokens_per_frame * sizes.dim * sizes.num_layers
    own = "with dummy_forcing=off" if recording.context == "dense" else "until the roles are known"
    return [
        f"A video's forwards take {forwards / 1e12:.3g} TFLOP up to block {chosen.blocks[-1]}; recording "
        f"{len(chosen.wanted)} passes at {queries} of {geometry.tokens_per_block} queries adds {scores / 1e12:.3g} "
        "TFLOP of scores.",
        f"Recording adds at most {format_bytes(scoring_bytes(recording, sizes, device))} of tensors on the device, and "
        f"on the host {format_bytes(video_bytes(recording, sizes))} a video (twice that at the end, when all are "
        f"joined). The run's own memory comes beside: what inference.py --dry_run says {own}, less the VAE.",
    ]
