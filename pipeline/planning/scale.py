"""What one video on several processes takes: how even the heads' load is, what travels, and what a link makes of it.

All of it is calculated, from what heads keep (or are assumed to) and from sizes; nothing here is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from dummy.policy import ContextPolicy
from pipeline.planning.cost import assumed_layout
from wan.attention.exchange import HeadShares, share
from wan.config import ModelConfig
from wan.geometry import LatentGeometry

LINKS = {"NVLink 4, 450 GB/s": 450e9, "PCIe 5 x16, 64 GB/s": 64e9}  # bytes a second of one GPU, in one direction


@dataclass(frozen=True)
class Scale:
    """Of a steady block by `ranks` processes.

    `balance`: the most loaded rank's attention over the mean, layer by layer, as a mean over the layers; `held`: the
    largest share of the kept frames that one rank holds; `sent`: bytes that a rank sends in a block.
    """

    ranks: int
    balance: float
    held: float
    sent: float


def shares_of(policy: ContextPolicy, sizes: ModelConfig, geometry: LatentGeometry, ranks: int) -> HeadShares:
    """How heads are dealt once it is known what they keep; roles that a run has yet to find are assumed."""
    past, block = geometry.num_frames - geometry.frames_per_block, geometry.frames_per_block
    layout = assumed_layout(sizes, policy, past)
    if layout is None:
        return HeadShares.even(sizes.num_layers, sizes.num_heads, ranks, policy.initial)
    return HeadShares.balanced(layout, ranks, lambda kept: block + min(kept.total, past))


def most_loaded(policy: ContextPolicy, sizes: ModelConfig, geometry: LatentGeometry, ranks: int) -> int:
    """Of the ranks but the first, the one whose part of the cache is the largest when it is at its largest."""
    past, block = geometry.num_frames - geometry.frames_per_block, geometry.frames_per_block
    deals = [(shares_of(policy, sizes, geometry, ranks), past)]
    if policy.fixed_layout() is None and policy.observed is not None:
        before = HeadShares.even(sizes.num_layers, sizes.num_heads, ranks, policy.initial)
        deals.append((before, min(policy.observed.ar_start * block, past)))

    def frames(shares: HeadShares, rank: int, room: int) -> int:
        kept = (one for layer, row in enumerate(shares.kept) for one in row[shares.heads(layer, rank)])
        return sum(block + min(one.total, room) for one in kept)

    return max(range(1, ranks), key=lambda rank: max(frames(shares, rank, room) for shares, room in deals))


def scale_of(
    policy: ContextPolicy, sizes: ModelConfig, geometry: LatentGeometry, ranks: int, steps: int, itemsize: int
) -> Scale:
    """`steps` a block, in numbers of `itemsize` bytes."""
    past, block = geometry.num_frames - geometry.frames_per_block, geometry.frames_per_block
    shares = shares_of(policy, sizes, geometry, ranks)
    balance, held, kept_in_all = 0.0, [0] * ranks, 0
    for layer in range(sizes.num_layers):
        kept = [
            [min(one.total, past) for one in shares.kept[layer][shares.heads(layer, rank)]] for rank in range(ranks)
        ]
        loads = [sum(block + frames for frames in own) for own in kept]
        balance += max(loads) * ranks / sum(loads) / sizes.num_layers
        held = [before + sum(own) for before, own in zip(held, kept, strict=True)]
        kept_in_all += sum(map(sum, kept))
    sent = sum(block_bytes(shares, sizes, geometry, steps, itemsize)) / ranks
    return Scale(ranks, balance, max(held) / max(kept_in_all, 1), sent)


def block_bytes(
    shares: HeadShares, sizes: ModelConfig, geometry: LatentGeometry, steps: int, itemsize: int, clean: bool = True
) -> list[int]:
    """What every rank sends in a steady block of so many steps and, unless it is the last, a `clean` pass.

    Queries, keys and values of its tokens to the heads' ranks, and results of its heads to the tokens' ranks, once a
    layer and pass; the outputs of its tokens to all, once a step. The clean pass ends with the keys and values of the
    last layer.
    """
    tokens, width = geometry.frames_per_block * geometry.tokens_per_frame, sizes.dim // sizes.num_heads
    ranks = len(shares.counts[0])
    outputs = sizes.out_dim * sizes.patch_size[1] * sizes.patch_size[2]
    sent = []
    for rank in range(ranks):
        own = len(share(tokens, ranks, rank))
        there = [own * (sizes.num_heads - counts[rank]) for counts in shares.counts]  # heads of own tokens
        back = [counts[rank] * (tokens - own) for counts in shares.counts]  # tokens of own heads
        layers = sum(3 * first + second for first, second in zip(there, back, strict=True))
        encoded = layers - there[-1] - back[-1] if clean else 0
        numbers = (steps * layers + encoded) * width + steps * own * outputs * (ranks - 1)
        sent.append(numbers * itemsize)
    return sent


def scale_lines(scale: Scale) -> list[str]:
    """For a plan."""
    links = ", ".join(f"{1000 * scale.sent / speed:.1f} ms with {name}" for name, speed in LINKS.items())
    return [
        f"Parallel: {scale.ranks} processes; the most loaded has {scale.balance:.2f} times the mean attention, and "
        f"holds {100 * scale.held:.1f} % of the kept frames",
        f"  each sends {scale.sent / 1e6:.1f} MB a block, calculated: {links}, if nothing is computed meanwhile",
    ]
