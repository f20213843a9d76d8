"""The training forward computes what the product's cached loop computes: at a video's beginning, after prompt switches,
with full history and in a window with relative positions, and far into a video."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shapes.forward import Plan, TrainingForward, init_
from wan.config import ModelConfig
from wan.geometry import LatentGeometry
from wan.transformer.model import CausalWanModel

CONFIG = ModelConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=3, freq_dim=16, text_dim=12, text_len=7)
BATCH, COPIES = 2, 2
TIMESTEPS = [[1000.0, 833.0, 625.0, 300.0, 50.0], [20.0, 700.0, 937.5, 100.0, 400.0]]  # of the copies, block by block


def model() -> CausalWanModel:
    net = init_(CausalWanModel(CONFIG), 3)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.startswith("head") or name.endswith("bias"):
                parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(4))
    return net


def product_flows(net: CausalWanModel, clean: Tensor, noisy: Tensor, embeds: Tensor, plan: Plan) -> Tensor:
    """The flows of all copies of the blocks that are not quiet, block by block through the cache."""
    text = net.encode_text(embeds)
    places = [plan.position(block) for block in range(plan.blocks)]
    cache = net.new_cache(LatentGeometry(4, 4, 3 * (places[-1] // 3 + 2), 3), BATCH, plan.retention, plan.window)
    zero = net.encode_time(0.0)
    if plan.prefix:
        cache.begin_pass(0, plan.prefix)
        net.commit(clean[:, : plan.prefix], zero, text, cache, 0)
    if plan.gap:  # time passes, and no more than the first frame is kept
        cache.forget(keep_sinks_before=1)
    flows = []
    for i, place in enumerate(places):
        cache.begin_pass(place, 3)
        if i >= plan.quiet:
            times = [net.encode_time(TIMESTEPS[copy][i]) for copy in range(COPIES)]
            row = [net(noisy[:, copy, i - plan.quiet], time, text, cache, place) for copy, time in enumerate(times)]
            flows.append(torch.stack(row, dim=1))
        if i + 1 < plan.blocks:
            first = plan.prefix + 3 * i
            net.commit(clean[:, first : first + 3], zero, text, cache, place)
    return torch.stack(flows, dim=2)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(4),
        Plan(3, prefix=3),
        Plan(2, prefix=6),
        Plan(5, prefix=3, window=7),
        Plan(4, prefix=7, window=7),
        Plan(4, prefix=10, window=10),
        Plan(5, prefix=3, quiet=2, window=7, gap=True),
        Plan(5, prefix=7, quiet=3, window=7, gap=True),
        Plan(5, prefix=10, quiet=3, window=10, gap=True),
    ],
    ids=str,
)
@torch.no_grad()
def test_equals_the_cached_loop(plan: Plan) -> None:
    generator = torch.Generator().manual_seed(plan.prefix)
    net = model()
    clean = torch.randn(BATCH, plan.clean, 16, 4, 4, generator=generator)
    noisy = torch.randn(BATCH, COPIES, plan.blocks - plan.quiet, 3, 16, 4, 4, generator=generator)
    embeds = torch.randn(BATCH, 7, 12, generator=generator)
    times = torch.tensor(TIMESTEPS)[None, :, plan.quiet : plan.blocks].expand(BATCH, -1, -1)
    expected = product_flows(net, clean, noisy, embeds, plan)
    found = TrainingForward(net)(clean, noisy, times, embeds, plan)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-4
