"""Linear layers in FP8 (e4m3, arXiv 2209.05433), with a scale for every row of inputs and of weights.

Inputs are scaled by what they are (dynamic scales), so nothing has to be calibrated. Hopper's and later tensor cores
multiply FP8 twice as fast as bf16; whether that pays depends on the scaling being fused with what comes before, which
torch.compile does. Everything outside the linear layers of the transformer's blocks stays as it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from utils.errors import InputError
from wan.transformer.layers import SelfAttention
from wan.transformer.model import CausalWanModel

LARGEST = 448.0  # of e4m3
CAPABILITY = (9, 0)  # from which on products take a scale a row
COMPILER_KNOWS_SCALED_MM = TorchVersion(torch.__version__) >= "2.13"  # that of 2.11 knows its older name alone


def check_fp8(device: torch.device) -> None:
    """Raises InputError if the device has no FP8 products."""
    if device.type != "cuda":
        raise InputError(f"precision: 'fp8' needs an NVIDIA GPU, this is {device.type}; use 'auto'")
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY or torch.version.hip is not None:
        found = ".".join(map(str, capability))
        raise InputError(f"precision: 'fp8' needs compute capability 9.0 (Hopper) or more, this is {found}; use 'bf16'")


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] in e4m3, and the factors [M, 1], float32, by which its rows were divided."""
    scales = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
    return (x.float() / scales).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scales


def product(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, bias: Tensor) -> Tensor:
    """(a * a_scales) (b * b_scales)^T + bias in the dtype of `bias`; a [M, K] and b [N, K] e4m3, scales [M or N, 1]."""
    if a.is_cuda:
        return _scaled_product(a, a_scales, b, b_scales, bias)
    return ((a.float() * a_scales) @ (b.float() * b_scales).t() + bias.float()).to(bias.dtype)


def _scaled_product(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, bias: Tensor) -> Tensor:
    """`product` by tensor cores."""
    if not COMPILER_KNOWS_SCALED_MM:
        return torch._scaled_mm(a, b.t(), a_scales, b_scales.t(), bias, out_dtype=bias.dtype, use_fast_accum=True)
    each_row = F.ScalingType.RowWise
    scales = a_scales, each_row, b_scales.t(), each_row
    return F.scaled_mm(a, b.t(), *scales, bias=bias, output_dtype=bias.dtype, use_fast_accum=True)


class Fp8Linear(nn.Module):
    """A linear layer whose weight is e4m3."""

    weight: Tensor
    scales: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        """weight [N, K], bias [N]."""
        super().__init__()
        rows, scales = quantise(weight.detach())
        self.register_buffer("weight", rows)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias.detach().clone())

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """x [..., K] -> [..., N - first]: the outputs from `first` on."""
        rows, scales = quantise(x.flatten(0, -2))
        out = product(rows, scales, self.weight[first:], self.scales[first:], self.bias[first:])
        return out.view(*x.shape[:-1], out.shape[-1])


class Fp8SelfAttention(SelfAttention):
    """The projections of self-attention in FP8."""

    def __init__(self, source: SelfAttention) -> None:
        nn.Module.__init__(self)
        self.head_dim = source.head_dim
        self.norm_q, self.norm_k = source.norm_q, source.norm_k
        self.qkv = Fp8Linear(source.qkv_weight, source.qkv_bias)
        self.out = Fp8Linear(source.o.weight, source.o.bias)

    def fuse(self) -> None:
        """The weights of q, k and v are one tensor for good."""

    def inputs(self, x: Tensor, first: int = 0) -> Tensor:
        return self.qkv(x, first)  # type: ignore[no-any-return]

    def output(self, attended: Tensor) -> Tensor:
        return self.out(attended)  # type: ignore[no-any-return]

    def output_weight(self) -> Tensor:
        return self.out.weight.float() * self.out.scales


def to_fp8(model: CausalWanModel) -> None:
    """Turn the linear layers of all blocks into FP8, in place, layer by layer."""
    for block in model.layers():
        block.self_attn = Fp8SelfAttention(block.self_attn)
        for owner, name in ((block.cross_attn, "q"), (block.cross_attn, "o"), (block.ffn, "0"), (block.ffn, "2")):
            linear = owner.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            setattr(owner, name, Fp8Linear(linear.weight, linear.bias))
