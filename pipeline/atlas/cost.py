"""What recording an atlas takes beside the run itself, counted from sizes alone: no file is needed."""

from __future__ import annotations

from dummy.frame_attention import PIECE_BYTES, sampled
from pipeline.atlas.recording import Recording, watched_policy
from pipeline.config.config import geometry_of
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


def scoring_bytes(recording: Recording, sizes: ModelConfig) -> int:
    """The most that a recorded pass adds to what is there, as bytes of tensors.

    Beside what is kept of the video's earlier passes: the sampled queries and their copy in float32; the keys in
    float32, and once more where they are laid out for the product; of one piece of the queries the scores, the shares
    and two temporaries of the entropy.
    """
    geometry = geometry_of(recording.config, sizes.in_dim)
    queries = sampled(geometry.tokens_per_block, recording.query_share, most=None)
    keys = max(seen_frames(recording)) * geometry.tokens_per_frame
    a_query = FLOAT * keys * sizes.num_heads
    piece = a_query * min(queries, max(1, PIECE_BYTES // a_query))
    return 2 * FLOAT * (queries + keys) * sizes.dim + 4 * piece + video_bytes(recording, sizes)


def video_bytes(recording: Recording, sizes: ModelConfig) -> int:
    """What is kept of a video: of each recorded pass the share of every frame and the entropy, for each head, and the
    places of the sampled queries."""
    seen, passes = seen_frames(recording), len(recording.passes.passes)
    numbers = sum(seen[block] + 1 for block in recording.passes.blocks) * passes
    queries = sampled(geometry_of(recording.config, sizes.in_dim).tokens_per_block, recording.query_share, most=None)
    places = queries * len(recording.passes.blocks) * passes
    return FLOAT * numbers * sizes.num_layers * sizes.num_heads + PLACE * places


def cost_lines(recording: Recording, sizes: ModelConfig) -> list[str]:
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
        f"Recording adds at most {format_bytes(scoring_bytes(recording, sizes))} of tensors on the device, and on the "
        f"host {format_bytes(video_bytes(recording, sizes))} a video (twice that at the end, when all are joined). The "
        f"run's own memory comes beside: what inference.py --dry_run says {own}, less the VAE.",
    ]
