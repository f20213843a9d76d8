"""Weights of the transformer's layers in shards, one a rank, for models that are larger than a device.

This is fully sharded data parallelism (arXiv 2304.11277) by torch.distributed.fsdp, forward only.
A layer's weights are gathered before the layer runs and go back to shards after it. Modulations, which all layers'
timesteps need at once, and what is not in a layer stay whole on every rank: 2 % of the 14B model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from wan.checkpoints.filling import load_into
from wan.transformer.layers import SelfAttention, TransformerBlock


class JoinedSelfAttention(SelfAttention):
    """Self-attention whose weights of q, k and v are one parameter: views of one tensor could not be sharded."""

    def __init__(self, source: SelfAttention) -> None:
        nn.Module.__init__(self)
        self.head_dim = source.head_dim
        self.norm_q, self.norm_k, self.o = source.norm_q, source.norm_k, source.o
        self.weight = nn.Parameter(source.qkv_weight, requires_grad=False)
        self.bias = nn.Parameter(source.qkv_bias, requires_grad=False)

    def fuse(self) -> None:
        """It is one tensor for good."""

    def inputs(self, x: Tensor, first: int = 0) -> Tensor:
        return F.linear(x, self.weight[first:], self.bias[first:])

    def output_weight(self) -> Tensor:
        """As ever; all ranks ask for it at the same time."""
        from torch.distributed.tensor import DTensor  # which takes as long

        return cast(DTensor, self.o.weight.detach()).full_tensor()


def shard(block: TransformerBlock, mesh: DeviceMesh) -> None:
    """Leave each rank of the mesh its shard of the layer's weights, which all of them have whole."""
    from torch.distributed.fsdp import fully_shard  # takes most of a second, and few need it

    block.self_attn = JoinedSelfAttention(block.self_attn)
    fully_shard(block, mesh=mesh, ignored_params={block.modulation})


def load_sharded(
    model: nn.Module,
    state: dict[str, Tensor],
    source: Path,
    dtype: torch.dtype,
    device: torch.device,
    mesh: DeviceMesh,
) -> None:
    """As `load_into`, of a transformer whose names and shapes have been checked, sharded over the mesh; `state` is
    emptied. No more than one layer is ever whole on the device."""
    layers = {f"{name}.": part for name, part in model.named_modules() if isinstance(part, TransformerBlock)}
    others = {f"{name}.": part for name, part in model.named_children() if name != "blocks"}
    for prefix, part in {**others, **layers}.items():
        own = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
        load_into(part, own, source, dtype, device, consume=True)
        if prefix in layers:
            shard(layers[prefix], mesh)


def shard_bytes(layers: Sequence[TransformerBlock], ranks: int) -> tuple[int, int]:
    """Of layers that are whole: how much less a rank holds once they are sharded, and what a layer takes while it is
    gathered, which is there twice when it arrives."""
    sizes = [sum(one.nbytes for one in layer.parameters()) - layer.modulation.nbytes for layer in layers]
    return sum(sizes) - -(-sum(sizes) // ranks), 2 * max(sizes)


def gathered(blocks: Sequence[TransformerBlock]) -> Iterator[TransformerBlock]:
    """The layers one after the other, each with its whole weights as long as the caller is at it. All ranks must take
    the same."""
    for block in blocks:
        if type(block) is TransformerBlock:  # of which sharding makes another class
            yield block
            continue
        from torch.distributed.fsdp import FSDPModule

        assert isinstance(block, FSDPModule)
        with torch.inference_mode(False), torch.no_grad():
            block.unshard()
        try:
            yield block
        finally:
            with torch.inference_mode(False), torch.no_grad():
                block.reshard()
