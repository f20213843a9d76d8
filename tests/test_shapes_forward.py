"""The training forward computes what the product's cached loop computes, with prompt switches and without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shapes.forward import TrainingForward, init_
from wan.attention.head_group import FULL_HISTORY
from wan.config import ModelConfig
from wan.geometry import LatentGeometry
from wan.transformer.model import CausalWanModel

CONFIG = ModelConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=3, freq_dim=16, text_dim=12, text_len=7)
BATCH, BLOCKS, COPIES = 2, 4, 2
TIMESTEPS = [[1000.0, 833.0, 625.0, 300.0], [20.0, 700.0, 937.5, 100.0]]  # of the copies, block by block


def model() -> CausalWanModel:
    net = init_(CausalWanModel(CONFIG), 3)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.startswith("head") or name.endswith("bias"):
                parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(4))
    return net


def product_flows(net: CausalWanModel, clean: Tensor, noisy: Tensor, embeds: Tensor, switch: int) -> Tensor:
    """The flows of all copies of the blocks from `switch` on, block by block through the cache."""
    text = net.encode_text(embeds)
    cache = net.new_cache(LatentGeometry(4, 4, 3 * BLOCKS, 3), BATCH, FULL_HISTORY)
    zero = net.encode_time(0.0)
    if switch:
        net.commit(clean[:, :switch].flatten(1, 2), zero, text, cache, 0)
    flows = []
    for i in range(switch, BLOCKS):
        times = [net.encode_time(TIMESTEPS[copy][i]) for copy in range(COPIES)]
        row = [net(noisy[:, copy, i - switch], time, text, cache, 3 * i) for copy, time in enumerate(times)]
        flows.append(torch.stack(row, dim=1))
        if i + 1 < BLOCKS:
            net.commit(clean[:, i], zero, text, cache, 3 * i)
    return torch.stack(flows, dim=2)


@pytest.mark.parametrize("switch", [0, 1, 2])
@torch.no_grad()
def test_equals_the_cached_loop(switch: int) -> None:
    generator = torch.Generator().manual_seed(switch)
    net = model()
    clean = torch.randn(BATCH, BLOCKS, 3, 16, 4, 4, generator=generator)
    noisy = torch.randn(BATCH, COPIES, BLOCKS - switch, 3, 16, 4, 4, generator=generator)
    embeds = torch.randn(BATCH, 7, 12, generator=generator)
    times = torch.tensor(TIMESTEPS)[None, :, switch:].expand(BATCH, -1, -1)
    expected = product_flows(net, clean, noisy, embeds, switch)
    found = TrainingForward(net)(clean, noisy, times, embeds, switch)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-4
