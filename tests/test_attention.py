"""The one attention: its choice of backend, and that it is plain softmax attention."""

from __future__ import annotations

import pytest
import torch

from utils.errors import InputError
from wan.attention import attention_backend, choose_backend, sdpa

CPU = torch.device("cpu")


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (4, 9), (7, 3)])
def test_sdpa_is_softmax_attention(queries: int, keys: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, queries, 3, 8, generator=generator)
    k, v = (torch.randn(2, keys, 3, 8, generator=generator) for _ in "kv")
    scores = torch.einsum("blhd,bshd->bhls", q, k) * 8**-0.5
    expected = torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v)
    torch.testing.assert_close(sdpa(q, k, v), expected)


def test_a_cpu_takes_pytorchs_own() -> None:
    assert choose_backend(CPU, torch.float32) == "sdpa"
    assert attention_backend("auto", CPU, torch.float32) is sdpa


@pytest.mark.parametrize("name", ["cudnn", "fa2", "fa3"])
def test_what_cannot_run_says_so(name: str) -> None:
    with pytest.raises(InputError, match=rf"attention: '{name}' needs an NVIDIA GPU and bf16.*use 'auto'"):
        attention_backend(name, CPU, torch.float32)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["sdpa", "cudnn", "auto"])
def test_backends_agree_on_a_gpu(name: str) -> None:
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, length, 4, 128, generator=generator, device=device, dtype=torch.bfloat16)
        for length in (1560, 4680, 4680)
    )
    out = attention_backend(name, device, torch.bfloat16)(q[:, :, 1:3], k[:, :, 1:3], v[:, :, 1:3])  # type: ignore[arg-type]
    expected = sdpa(q[:, :, 1:3].float(), k[:, :, 1:3].float(), v[:, :, 1:3].float())
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)
