"""The transformer: names, sizes, an independent twin, and its own invariants."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny import CONFIG, random_embeds, tiny_model
from wan.attention.head_group import FULL_HISTORY, HeadLayout, Retention
from wan.config import WAN_1_3B, WAN_14B, ModelConfig
from wan.geometry import LatentGeometry
from wan.transformer.layers import gelu_product, has_gelu_product
from wan.transformer.model import CausalWanModel

KEYS = json.loads((Path(__file__).parent / "data" / "checkpoint_keys.json").read_text())
GEOMETRY = LatentGeometry(6, 8, 9, 3)


def test_the_published_names_and_shapes_are_the_models() -> None:
    with torch.device("meta"):
        model = CausalWanModel(WAN_1_3B)
    found = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    expected = next(table for table in KEYS.values() if "blocks.0.self_attn.q.weight" in table)
    assert len(expected) == 825
    assert found == expected


def test_14b_builds_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = CausalWanModel(WAN_14B)
    assert sum(parameter.nelement() for parameter in model.parameters()) == 14_288_491_584


def diffusers_twin(model: CausalWanModel, config: ModelConfig) -> torch.nn.Module:
    """Diffusers' WanTransformer3DModel with our weights under its names."""
    from diffusers import WanTransformer3DModel

    twin = WanTransformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_dim,
        out_channels=config.out_dim,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
    )
    attention = {f"{part}.": f"to_{part}." for part in "qkv"} | {"o.": "to_out.0."}
    renamed: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        new = name
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2")):
            for old, other in attention.items():
                new = new.replace(f"{ours}.{old}", f"{theirs}.{other}")
            new = new.replace(f"{ours}.", f"{theirs}.")
        for old, other in (
            ("norm3.", "norm2."),
            ("ffn.0.", "ffn.net.0.proj."),
            ("ffn.2.", "ffn.net.2."),
            ("head.head.", "proj_out."),
            ("head.modulation", "scale_shift_table"),
            ("modulation", "scale_shift_table"),
            ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
            ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
            ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
            ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
            ("time_projection.1", "condition_embedder.time_proj"),
        ):
            new = new.replace(old, other)
        renamed[new] = tensor
    twin.load_state_dict(renamed)
    return twin.eval()


@pytest.mark.parametrize("heads", [2, 4])
@torch.inference_mode()
def test_a_first_block_equals_diffusers(heads: int) -> None:
    config = replace(CONFIG, num_heads=heads)
    model = tiny_model(config)
    latents = torch.randn(2, 3, 16, 6, 8, generator=torch.Generator().manual_seed(3))
    embeds = random_embeds(config, batch=2)
    cache = model.new_cache(GEOMETRY, 2, FULL_HISTORY)
    flow = model(latents, model.encode_time(625.0), model.encode_text(embeds), cache, 0)
    twin = diffusers_twin(model, config)
    expected = twin(latents.transpose(1, 2), torch.tensor([625.0, 625.0]), embeds, return_dict=False)[0].transpose(1, 2)
    torch.testing.assert_close(flow, expected, atol=2e-5, rtol=1e-4)


@torch.inference_mode()
def test_a_clean_pass_leaves_the_cache_that_a_whole_forward_leaves() -> None:
    model = tiny_model()
    time, text = model.encode_time(0.0), model.encode_text(random_embeds())
    caches = [model.new_cache(GEOMETRY, 1, Retention(1, 2)) for _ in range(2)]
    for start in (0, 3):
        latents = torch.randn(1, 3, 16, 6, 8, generator=torch.Generator().manual_seed(start))
        model(latents, time, text, caches[0], start, commit=True)
        model.commit(latents, time, text, caches[1], start)
    own = GEOMETRY.tokens_per_block
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert one.groups[0].frames == other.groups[0].frames == [0, 4, 5]
        torch.testing.assert_close(one.groups[0].kv[:, :, own:], other.groups[0].kv[:, :, own:])


def ordered(rows: list[list[int]]) -> HeadLayout:
    return HeadLayout(rows, [[(len(row), FULL_HISTORY)] for row in rows])


@torch.inference_mode()
@pytest.mark.parametrize("rows", [[[3, 1, 0, 2]] * 3, [[0, 1, 2, 3], [1, 2, 3, 0], [2, 0, 3, 1]]])
def test_the_order_of_heads_is_the_caches_and_changes_no_bit(rows: list[list[int]]) -> None:
    model = tiny_model()
    time, text = model.encode_time(500.0), model.encode_text(random_embeds())
    plain, other = (model.new_cache(GEOMETRY, 1, FULL_HISTORY, layout=layout) for layout in (None, ordered(rows)))
    for start in (0, 3):
        latents = torch.randn(1, 3, 16, 6, 8, generator=torch.Generator().manual_seed(start))
        flows = [model(latents, time, text, cache, start) for cache in (plain, other)]
        assert torch.equal(*flows)
        for cache in (plain, other):
            model.commit(latents, time, text, cache, start)
    for one, two, row in zip(plain.layers, other.layers, rows, strict=True):
        assert torch.equal(one.groups[0].kv[:, :, :, row], two.groups[0].kv)


@torch.inference_mode()
def test_time_is_computed_in_float32_whatever_the_weights_are() -> None:
    model = tiny_model().bfloat16()
    exact = tiny_model()
    exact.load_state_dict(model.state_dict())
    context = model.encode_time(937.5)
    assert context.layers.dtype is torch.bfloat16
    torch.testing.assert_close(context.modulation, exact.encode_time(937.5).modulation)


@torch.inference_mode()
def test_bf16_is_float32_to_its_rounding() -> None:
    model = tiny_model()
    latents = torch.randn(1, 3, 16, 6, 8, generator=torch.Generator().manual_seed(0))

    def flow(dtype: torch.dtype) -> Tensor:
        cast = tiny_model().to(dtype)
        text = cast.encode_text(random_embeds())
        return cast(latents, cast.encode_time(625.0), text, cast.new_cache(GEOMETRY, 1, FULL_HISTORY), 0)

    exact, rounded = flow(model.dtype), flow(torch.bfloat16)
    assert (exact - rounded).norm() / exact.norm() < 0.03


def test_the_fused_weights_follow_every_replacement() -> None:
    """.to(), loading and copying replace tensors one by one; the product for q, k and v must still be theirs."""
    model = tiny_model()
    copied = copy.deepcopy(model)
    reloaded = CausalWanModel(CONFIG)
    reloaded.load_state_dict(model.state_dict(), assign=True)
    for made in (copied, reloaded, copy.deepcopy(model).bfloat16(), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            made.blocks[1].self_attn.k.weight.add_(1)
        attention = made.blocks[1].self_attn
        assert torch.equal(attention.qkv_weight, torch.cat([getattr(attention, name).weight for name in "qkv"]))
    assert sum(
        p.untyped_storage().nbytes() for p in {p.untyped_storage().data_ptr(): p for p in model.parameters()}.values()
    ) == (sum(p.nbytes for p in model.parameters()))


@torch.inference_mode()
def test_compiled_layers_are_the_eager_ones_compiled_once() -> None:
    """Whole graphs (a break would be an error), and none more for later blocks, new roles, or another prompt."""
    torch._dynamo.reset()
    model, compiled = tiny_model(), tiny_model()
    compiled.compile_layers()
    graphs = []
    torch._dynamo.utils.counters.clear()
    orders = [None, None, [[1, 0, 2, 3]] * 3, [[3, 2, 0, 1]] * 3]
    for step, rows in enumerate(orders):
        latents = torch.randn(1, 3, 16, 6, 8, generator=torch.Generator().manual_seed(step))
        outputs = []
        for made in (model, compiled):
            time, text = made.encode_time(937.5), made.encode_text(random_embeds(seed=step))
            cache = made.new_cache(GEOMETRY, 1, FULL_HISTORY, layout=rows and ordered(rows))
            for start in (0, 3):
                outputs.append(made(latents, time, text, cache, start, commit=True))
        torch.testing.assert_close(outputs[2], outputs[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(outputs[3], outputs[1], atol=1e-5, rtol=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [3, 3, 5, 5]  # heads in an order of their own: other functions before and after attention
    assert not torch._dynamo.utils.counters["graph_break"]


@torch.inference_mode()
def test_gelu_within_a_product_is_left_to_gpus() -> None:
    """A CPU's has the other form of GELU, which shows that weights, biases and shapes are where they belong."""
    widen = torch.nn.Linear(16, 24)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    assert not has_gelu_product(x)
    torch.testing.assert_close(gelu_product(widen, x), torch.nn.functional.gelu(widen(x)))
