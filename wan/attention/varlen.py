"""One attention launch for heads that see differently many frames: every head of every video is a sequence.

The other way (wan.attention.cache) launches once for neighbouring heads that see equally much. Here a layer's heads lie
one after the other in one buffer, and how much of it each of them sees is data on the device: a recording
(wan/transformer/graphs.py) of one pass serves all states of a growing cache. FlashAttention wants a sequence's queries
side by side, which costs a copy of the queries and one of the result.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import InputError
from utils.transfer import to_device
from wan.attention.backends import AMPERE, HOPPER, AttentionName, flash_function, usable


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
        """Empty ones; capacities[h] rows for head h.

        Rows are zeros from the start: FlashAttention multiplies values that a head does not see by 0, and whatever
        memory held before may be no number.
        """
        kv = like.new_zeros(2, batch, sum(capacities), head_dim)
        ends = torch.tensor([0, *(list(capacities) * batch)], device="cpu").cumsum(0)
        queries = block_tokens * torch.arange(len(ends), device="cpu")
        starts, queries = (to_device(part.int(), like.device) for part in (ends, queries))
        return cls(kv, starts, torch.zeros_like(starts[1:]), queries, block_tokens, max(capacities))

    def clear(self) -> None:
        """Be as new for another video: nothing that this one has left, a number or not, reaches it."""
        self.kv.zero_()

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


@cache
def _public_takes_lengths() -> bool:
    """Whether torch.nn.attention.varlen.varlen_attn takes `seqused_k` (from torch 2.12 or 2.13 on)."""
    from torch.nn.attention.varlen import varlen_attn

    return "seqused_k" in inspect.signature(varlen_attn).parameters


def flash(q: Tensor, seen: RaggedKV) -> Tensor:
    """PyTorch's own FlashAttention."""
    keys, values = seen.kv.flatten(1, 2).unsqueeze(2)
    sequences = seen.queries, seen.starts, seen.block_tokens, seen.most
    if _public_takes_lengths():
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(_side_by_side(q), keys, values, *sequences, seqused_k=seen.lengths)
    else:  # the operator below it does
        operator = torch.ops.aten._flash_attention_forward
        out = operator(_side_by_side(q), keys, values, *sequences, 0.0, False, False, seqused_k=seen.lengths)[0]
    return _as_heads(out, q)


def flash3(function: Callable[..., object]) -> RaggedFn:
    """FlashAttention 3 by its package's `flash_attn_varlen_func`."""

    def flash(q: Tensor, seen: RaggedKV) -> Tensor:
        keys, values = seen.kv.flatten(1, 2).unsqueeze(2)
        most = seen.block_tokens, seen.most
        out = function(_side_by_side(q), keys, values, seen.queries, seen.starts, *most, seqused_k=seen.lengths)
        return _as_heads(out[0] if isinstance(out, tuple) else out, q)

    return flash


def _side_by_side(q: Tensor) -> Tensor:
    """[B, L, H, D] -> [B * H * L, 1, D]."""
    return q.transpose(1, 2).reshape(-1, 1, q.shape[-1])


def _as_heads(out: object, like: Tensor) -> Tensor:
    assert isinstance(out, Tensor)
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
    if capability[0] == HOPPER[0] and usable("fa3"):
        function = flash_function("fa3", "flash_attn_varlen_func")
        if not isinstance(function, str):
            return flash3(function)
    return flash
