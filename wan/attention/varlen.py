"""One attention launch for heads that see differently many frames: every head of every video is a sequence.

The other way (wan.attention.cache) launches once for neighbouring heads that see equally much. Here a layer's heads lie
one after the other in one buffer, and how much of it each of them sees is data on the device: a recording
(wan/transformer/graphs.py) of one pass serves all states of a growing cache. FlashAttention wants a sequence's queries
side by side, which costs a copy of the queries and one of the result.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import InputError
from wan.attention.backends import AMPERE, HOPPER, AttentionName, installed


@dataclass(frozen=True)
class RaggedKV:
    """The keys of a layer's heads: for B videos of H heads B * H sequences, those of a video one after the other.

    `kv` [2, B, rows, D] holds the heads' buffers one after the other; sequence i is in rows starts[i] to
    starts[i] + lengths[i] of the B * rows. `queries` [B * H + 1] says the same of the queries, all of them
    `block_tokens` long. `starts` [B * H + 1], `lengths` [B * H] and `queries` are int32; `most` is the longest buffer.
    """

    kv: Tensor
    starts: Tensor
    lengths: Tensor
    queries: Tensor
    block_tokens: int
    most: int

    @classmethod
    def of(cls, like: Tensor, batch: int, capacities: Sequence[int], head_dim: int, block_tokens: int) -> RaggedKV:
        """Empty ones; capacities[h] rows for head h."""
        kv = like.new_empty(2, batch, sum(capacities), head_dim)
        ends = torch.tensor([0, *(list(capacities) * batch)]).cumsum(0)
        queries = block_tokens * torch.arange(len(ends))
        starts, queries = (part.to(like.device, torch.int32) for part in (ends, queries))
        return cls(kv, starts, torch.zeros_like(starts[1:]), queries, block_tokens, max(capacities))

    def set_lengths(self, heads: slice, tokens: int) -> None:
        """From now on these heads, of all videos, see `tokens` rows."""
        self.lengths.view(self.kv.shape[1], -1)[:, heads].fill_(tokens)


RaggedFn = Callable[[Tensor, RaggedKV], Tensor]
"""(q [B, L, H, D], the sequences that its heads see) -> [B, L, H, D]."""


def masked(q: Tensor, seen: RaggedKV) -> Tensor:
    """The plain twin, for CPUs: every head's buffer filled up to the longest, and a mask over what it does not see,
    which may hold anything."""
    places = torch.arange(seen.most, device=q.device)
    rows = (seen.starts[:-1, None] + places).clamp(max=seen.starts[-1] - 1)
    visible = (places < seen.lengths[:, None])[..., None]
    keys, values = (
        part[rows].masked_fill(~visible, 0.0).unflatten(0, (len(q), -1)) for part in seen.kv.flatten(1, 2)
    )  # [B, H, most, D]
    mask = visible.view(len(q), -1, 1, seen.most)
    return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, mask).transpose(1, 2)


def flash(q: Tensor, seen: RaggedKV) -> Tensor:
    """PyTorch's own FlashAttention. torch.nn.attention.varlen.varlen_attn calls the same operator, but does not take
    the lengths in torch 2.11."""
    keys, values = seen.kv.flatten(1, 2).unsqueeze(2)
    out = torch.ops.aten._flash_attention_forward(
        _side_by_side(q), keys, values, seen.queries, seen.starts, seen.block_tokens, seen.most, 0.0, False, False,
        seqused_k=seen.lengths,
    )[0]  # fmt: skip
    return _as_heads(out, q)


def flash3(q: Tensor, seen: RaggedKV) -> Tensor:
    """FlashAttention 3, where its package is installed."""
    function = importlib.import_module("flash_attn_interface").flash_attn_varlen_func
    keys, values = seen.kv.flatten(1, 2).unsqueeze(2)
    most = seen.block_tokens, seen.most
    out = function(_side_by_side(q), keys, values, seen.queries, seen.starts, *most, seqused_k=seen.lengths)
    return _as_heads(out[0] if isinstance(out, tuple) else out, q)


def _side_by_side(q: Tensor) -> Tensor:
    """[B, L, H, D] -> [B * H * L, 1, D]."""
    return q.transpose(1, 2).reshape(-1, 1, q.shape[-1])


def _as_heads(out: Tensor, like: Tensor) -> Tensor:
    batch, length, heads, width = like.shape
    return out.view(batch, heads, length, width).transpose(1, 2)


def ragged_backend(name: AttentionName, device: torch.device, dtype: torch.dtype) -> RaggedFn | None:
    """What runs all heads of a layer at once, if `name` asks for that. Raises InputError if it cannot run here."""
    if name != "varlen":
        return None
    if device.type != "cuda":
        return masked
    capability = torch.cuda.get_device_capability(device)
    if capability < AMPERE or dtype not in (torch.bfloat16, torch.float16):
        raise InputError(
            f"attention: 'varlen' needs bf16 and compute capability 8.0 or more, not {dtype} and "
            f"{capability[0]}.{capability[1]}; use 'auto'"
        )
    return flash3 if capability[0] == HOPPER[0] and installed("fa3") else flash
