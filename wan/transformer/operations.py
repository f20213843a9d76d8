"""Operations of a pass, counted from sizes (a multiplication and an addition are two)."""

from __future__ import annotations

from wan.config import ModelConfig
from wan.geometry import LatentGeometry


def linear_operations(config: ModelConfig, tokens: int) -> int:
    """All linear layers of one forward over `tokens` tokens; what a prompt or a timestep needs once is not in it."""
    per_layer = 6 * config.dim**2 + 2 * config.dim * config.ffn_dim  # q k v o, cross q o, and the FFN
    patch = 4 * config.dim * (config.in_dim + config.out_dim)
    return 2 * tokens * (config.num_layers * per_layer + patch)


def text_attention_operations(config: ModelConfig, tokens: int) -> int:
    return 4 * tokens * config.text_len * config.dim * config.num_layers


def self_attention_operations(config: ModelConfig, geometry: LatentGeometry, head_frames: float) -> float:
    """`head_frames`: visible frames, the block's own included, summed over all heads of all layers."""
    return 4 * geometry.tokens_per_block * geometry.tokens_per_frame * config.head_dim * head_frames


def forward_operations(config: ModelConfig, geometry: LatentGeometry, head_frames: float) -> float:
    tokens = geometry.tokens_per_block
    return (
        linear_operations(config, tokens)
        + text_attention_operations(config, tokens)
        + self_attention_operations(config, geometry, head_frames)
    )


def clean_pass_operations(config: ModelConfig, geometry: LatentGeometry, head_frames: float) -> float:
    """A forward without the output head and without all of the last layer but its keys and values; that layer's heads
    are taken to see as much as all others do on average."""
    layers = config.num_layers
    last = 2 * geometry.tokens_per_block * (4 * config.dim**2 + 2 * config.dim * config.ffn_dim + 4 * config.dim * 16)
    text = text_attention_operations(config, geometry.tokens_per_block) / layers
    attention = self_attention_operations(config, geometry, head_frames) / layers
    return forward_operations(config, geometry, head_frames) - last - text - attention
