"""The layers of the Wan 2.1 transformer (arXiv 2503.20314) as functions of tensors.

A transformer block comes in three parts, between which the two attentions lie: what a head may see is not the layers'
business, and attention kernels are nothing that a compiler could join with its neighbours. Nothing here depends on a
position in the video or on a policy, so each part can be compiled once for all layers and all blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wan.attention.rope import Rotation, rotate
from wan.config import ModelConfig


class AttentionLayer(nn.Module):
    """Linear layers and norms that self- and cross-attention both have; the norms go over all heads together."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q = nn.RMSNorm(config.dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(config.dim, eps=config.eps)

    def heads(self, x: Tensor) -> Tensor:
        """[B, L, dim] -> [B, L, H, D]."""
        return x.view(*x.shape[:-1], -1, self.head_dim)


class SelfAttention(AttentionLayer):
    """Projections of self-attention; attention itself is the cache's.

    The weights of q, k and v are one tensor of which the three layers, whose names checkpoints use, are views: one
    product for all three, one copy in memory.
    """

    qkv_weight: Tensor
    qkv_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.fuse()
        self.register_load_state_dict_post_hook(_fuse)  # type: ignore[no-untyped-call]

    def fuse(self) -> None:
        """Lay the weights of q, k and v side by side again, after they were replaced."""
        layers = (self.q, self.k, self.v)
        self.register_buffer("qkv_weight", torch.cat([layer.weight.detach() for layer in layers]), persistent=False)
        self.register_buffer("qkv_bias", torch.cat([layer.bias.detach() for layer in layers]), persistent=False)
        for layer, weight, bias in zip(layers, self.qkv_weight.chunk(3), self.qkv_bias.chunk(3), strict=True):
            layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
            layer.bias = nn.Parameter(bias, requires_grad=layer.bias.requires_grad)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SelfAttention:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # .to() and others convert one by one
        self.fuse()
        return self

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # a copy got copies of each tensor
        self.fuse()

    def queries(self, x: Tensor, rotation: Rotation) -> Tensor:
        return rotate(self.heads(self.norm_q(x)), rotation)

    def keys(self, x: Tensor, rotation: Rotation) -> Tensor:
        return rotate(self.heads(self.norm_k(x)), rotation)

    def inputs(self, x: Tensor, first: int = 0) -> Tensor:
        """[B, L, dim] -> queries, keys and values side by side, from output `first` on."""
        return F.linear(x, self.qkv_weight[first:], self.qkv_bias[first:])

    def output(self, attended: Tensor) -> Tensor:
        """[B, L, dim], the heads side by side -> [B, L, dim]."""
        projected: Tensor = self.o(attended)
        return projected

    def output_weight(self) -> Tensor:
        """[dim, dim]: that of `output`, its columns the heads side by side."""
        return self.o.weight.detach()

    def project(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, dim] -> rotated queries and keys, and values, all [B, L, H, D]."""
        q, k, v = self.inputs(x).chunk(3, dim=-1)
        return self.queries(q, rotation), self.keys(k, rotation), self.heads(v)

    def keys_and_values(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """As `project`, without the queries."""
        k, v = self.inputs(x, first=x.shape[-1]).chunk(2, dim=-1)
        return self.keys(k, rotation), self.heads(v)


def _fuse(module: nn.Module, incompatible: object) -> None:
    assert isinstance(module, SelfAttention)
    module.fuse()


class CrossAttention(AttentionLayer):
    def keys_and_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """text [B, text_len, dim] -> keys and values, both [B, text_len, H, D]."""
        k = self.heads(self.norm_k(self.k(text)))
        return k, self.heads(self.v(text))

    def queries(self, x: Tensor) -> Tensor:
        return self.heads(self.norm_q(self.q(x)))


class FeedForward(nn.Sequential):
    """A linear layer, GELU in its tanh form, a linear layer."""

    def __init__(self, config: ModelConfig) -> None:
        widen, narrow = nn.Linear(config.dim, config.ffn_dim), nn.Linear(config.ffn_dim, config.dim)
        super().__init__(widen, nn.GELU(approximate="tanh"), narrow)

    def forward(self, x: Tensor) -> Tensor:
        widen, gelu, narrow = self
        joined = isinstance(widen, nn.Linear) and has_gelu_product(x)
        hidden = gelu_product(cast(nn.Linear, widen), x) if joined else gelu(widen(x))
        projected: Tensor = narrow(hidden)
        return projected


def has_gelu_product(x: Tensor) -> bool:
    """Whether cuBLASLt has a product for `gelu_product`, as good as ours (in float32 its GELU might be coarser), and
    no gradients are asked for."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    nvidia = x.is_cuda and torch.version.hip is None
    return nvidia and half and not torch.is_grad_enabled()


def gelu_product(linear: nn.Linear, x: Tensor) -> Tensor:
    """GELU of a linear layer's outputs, tanh form, applied within the product.

    The outputs are the widest tensor of a layer; reading and writing it once more takes a third as long as the product.
    """
    out = torch._addmm_activation(linear.bias, x.flatten(0, -2), linear.weight.t(), use_gelu=True)
    return out.view(*x.shape[:-1], -1)


class TransformerBlock(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=config.eps, elementwise_affine=False)
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps)
        self.cross_attn = CrossAttention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.eps, elementwise_affine=False)
        self.ffn = FeedForward(config)
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim))

    def before_attention(
        self, x: Tensor, time: Tensor, cos: Tensor, sin: Tensor, order: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, dim], time [6, dim] (or [6, F, dim], by frame), position tables -> queries, keys, values
        [B, L, H, D], their heads in the given order [H] (int64) or in that of the weights."""
        q, k, v = self.self_attn.project(modulated(time[0], self.norm1(x), time[1]), Rotation(cos, sin))
        return in_order(q, order), in_order(k, order), in_order(v, order)

    def between_attentions(
        self, x: Tensor, attended: Tensor, time: Tensor, inverse: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x with the self-attention's result [B, L, H, D] added, and the queries of cross-attention [B, L, H, D].

        `inverse` [H] brings heads that are in an order of their own back to that of the weights.
        """
        x = gated(x, time[2], self.self_attn.output(in_order(attended, inverse).flatten(2)))
        return x, self.cross_attn.queries(self.norm3(x))

    def after_attention(self, x: Tensor, attended: Tensor, time: Tensor) -> Tensor:
        """The rest of the layer: the cross-attention's result [B, L, H, D] added, and the FFN; [B, L, dim]."""
        x = x + self.cross_attn.o(attended.flatten(2))
        return gated(x, time[5], self.ffn(modulated(time[3], self.norm2(x), time[4])))

    def commit_only(
        self, x: Tensor, time: Tensor, rotation: Rotation, order: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What a clean pass needs of the last layer: its keys and values, nothing that would use them."""
        k, v = self.self_attn.keys_and_values(modulated(time[0], self.norm1(x), time[1]), rotation)
        return in_order(k, order), in_order(v, order)


def in_order(x: Tensor, order: Tensor | None) -> Tensor:
    """The heads of x [B, L, H, D] in the given order [H]; compiled, that is done where x is written anyway."""
    return x if order is None else x[:, :, order]


def modulated(shift: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """shift + x * scale of x [B, L, dim]; shift and scale [dim], or [F, dim] where the L tokens are F frames."""
    if scale.dim() == 1:
        return torch.addcmul(shift, x, scale)
    frames = rearrange(x, "b (f t) c -> b f t c", f=len(scale))
    return torch.addcmul(shift[:, None], frames, scale[:, None]).flatten(1, 2)


def gated(x: Tensor, gate: Tensor, added: Tensor) -> Tensor:
    """x + gate * added, of x and added [B, L, dim]; gate as in `modulated`."""
    if gate.dim() == 1:
        return torch.addcmul(x, gate, added)
    frames = rearrange(added, "b (f t) c -> b f t c", f=len(gate))
    return x + (frames * gate[:, None]).flatten(1, 2)


class OutputHead(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, eps=config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, math.prod(config.patch_size) * config.out_dim)
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        projected: Tensor = self.head(modulated(time[0], self.norm(x), time[1]))
        return projected
