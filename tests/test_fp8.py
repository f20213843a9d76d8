"""FP8 linear layers against the layers they come from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.tiny import CONFIG, random_embeds, tiny_model
from utils.errors import InputError
from wan.attention.head_group import FULL_HISTORY, HeadLayout
from wan.geometry import LatentGeometry
from wan.transformer.fp8 import LARGEST, Fp8Linear, check_fp8, product, quantise, to_fp8
from wan.transformer.model import CausalWanModel

GEOMETRY = LatentGeometry(6, 8, 9, 3)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_every_row_uses_the_whole_range() -> None:
    x = numbers(5, 64) * torch.tensor([1e-6, 1.0, 30.0, 1e6, 0.0])[:, None]
    rows, scales = quantise(x)
    assert rows.dtype is torch.float8_e4m3fn
    assert rows.float().abs().amax(1)[:4].tolist() == [LARGEST] * 4
    assert torch.equal(rows[4].float(), torch.zeros(64))
    back = rows.float() * scales
    # Three bits after the leading one, and steps of 2^-9 near zero.
    assert ((back - x).abs() <= x.abs() * 2**-4 + scales * 2**-10).all()


def test_a_layer_is_the_one_it_comes_from_to_rounding() -> None:
    source = torch.nn.Linear(256, 96)
    made = Fp8Linear(source.weight, source.bias)
    x = numbers(2, 7, 256)
    expected = source(x)
    assert (made(x) - expected).norm() / expected.norm() < 0.05
    assert torch.equal(made(x, first=32), made(x)[..., 32:])


@torch.inference_mode()
def flow(model: CausalWanModel, rows: list[list[int]] | None = None) -> Tensor:
    time, text = model.encode_time(625.0), model.encode_text(random_embeds())
    layout = None if rows is None else HeadLayout(rows, [[(4, FULL_HISTORY)]] * 3)
    cache = model.new_cache(GEOMETRY, 1, FULL_HISTORY, layout=layout)
    return model(numbers(1, 3, 16, 6, 8, seed=1), time, text, cache, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_in_fp8(dtype: torch.dtype) -> None:
    expected, model = flow(tiny_model().to(dtype)), tiny_model().to(dtype)
    to_fp8(model)
    made = flow(model)
    assert 1e-3 < (made - expected).norm() / expected.norm() < 0.05
    assert torch.equal(flow(model, [[3, 1, 0, 2], [1, 0, 2, 3], [2, 3, 1, 0]]), made)


def test_the_output_projection_is_as_it_was_to_rounding() -> None:
    """What errors of heads are measured by."""
    model, made = tiny_model(), tiny_model()
    to_fp8(made)
    for block, other in zip(model.layers(), made.layers(), strict=True):
        weight = block.self_attn.output_weight()
        assert 0 < (other.self_attn.output_weight() - weight).norm() / weight.norm() < 0.05


def test_half_of_the_memory() -> None:
    def size(model: CausalWanModel) -> int:
        tensors = [tensor for block in model.blocks for tensor in (*block.parameters(), *block.buffers())]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    model = tiny_model().bfloat16()
    before = size(model)
    to_fp8(model)
    kept = 2 * 3 * (2 * CONFIG.dim**2)  # cross-attention's k and v, which a prompt needs once
    assert (size(model) - kept) / (before - kept) < 0.65  # at this size biases and norms count


def test_what_cannot_have_it_says_so() -> None:
    with pytest.raises(InputError, match="precision: 'fp8' needs an NVIDIA GPU, this is cpu; use 'auto'"):
        check_fp8(torch.device("cpu"))


def test_the_program_says_so_too(program, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    assert program("precision=fp8") == 2
    assert "precision: 'fp8' needs an NVIDIA GPU" in capsys.readouterr().err
    assert program("engine=graphed") == 2
    assert "engine: 'graphed' needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs a Hopper GPU"
)
def test_a_product_on_a_gpu_is_its_twin() -> None:
    (a, a_scales), (b, b_scales) = quantise(numbers(64, 128)), quantise(numbers(48, 128, seed=1))
    bias = numbers(48, seed=2).bfloat16()
    arguments = a, a_scales, b, b_scales, bias
    on_gpu = product(*(tensor.cuda() for tensor in arguments)).cpu()
    torch.testing.assert_close(on_gpu.float(), product(*arguments).float(), atol=0.1, rtol=0.02)
