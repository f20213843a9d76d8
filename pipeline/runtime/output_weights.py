"""What an error of a head's output comes to in the stream: its rows of the output projection, and the layer's gate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wan.transformer.model import CausalWanModel, TimeContext


def gates_of(times: Sequence[TimeContext]) -> Tensor:
    """[layers, dim] in float32: by what a layer's attention is multiplied before it joins the stream, the root of the
    mean square over passes at these times."""
    gates = torch.stack([time.layers[:, 2].float() for time in times])
    return gates.square().mean(0).sqrt()


def output_grams(model: CausalWanModel, gates: Tensor) -> list[Tensor]:
    """For every layer [H, D, D] in float32: W_o W_o^T of each head's rows of the output projection, its channels
    multiplied by the layer's `gates` [layers, dim]."""
    grams = []
    for block, gate in zip(model.layers(), gates, strict=True):
        weight = block.self_attn.output_weight().float() * gate[:, None]  # [dim, H * D]: transposed, as formulas go
        rows = torch.unflatten(weight, 1, (model.config.num_heads, -1)).transpose(0, 1)  # [H, dim, D]
        grams.append(rows.transpose(1, 2) @ rows)
    return grams
