"""The one attention: its choice of backend, and that it is plain softmax attention."""

from __future__ import annotations

import pytest
import torch

from utils.errors import InputError
from wan.attention.backends import attention_backend, choose_backend, sdpa
from wan.attention.varlen import RaggedKV, flash, ragged_backend

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


def sequences(device: torch.device | str, dtype: torch.dtype) -> tuple[torch.Tensor, RaggedKV]:
    """Two videos of three heads that see 5, 9 and 2 of up to 9 rows; what they do not see is not a number."""
    generator = torch.Generator().manual_seed(0)
    seen = RaggedKV.of(torch.empty(0, dtype=dtype, device=device), 2, [9, 9, 4], 64, 4)
    for head, length in enumerate((5, 9, 2)):
        seen.set_lengths(slice(head, head + 1), length)
    if seen.kv.device.type != "meta":
        seen.kv.copy_(torch.randn(seen.kv.shape, generator=generator))
        for unseen in (slice(5, 9), slice(20, 22)):
            seen.kv[:, :, unseen] = torch.nan
    return torch.randn(2, 4, 3, 64, generator=generator).to(device, dtype), seen


def one_by_one(q: torch.Tensor, seen: RaggedKV) -> torch.Tensor:
    out = torch.empty_like(q)
    for video in range(2):
        for head, rows in enumerate((slice(0, 5), slice(9, 18), slice(18, 20))):
            k, v = seen.kv[:, video : video + 1, rows, None]
            out[video : video + 1, :, head : head + 1] = sdpa(q[video : video + 1, :, head : head + 1], k, v)
    return out


def test_heads_of_different_lengths_in_one_call() -> None:
    ragged = ragged_backend("varlen", CPU, torch.float32)
    assert ragged is not None and ragged_backend("auto", CPU, torch.float32) is None
    q, seen = sequences("cpu", torch.float32)
    torch.testing.assert_close(ragged(q, seen), one_by_one(q, seen))


def test_pytorchs_flash_attention_takes_the_call() -> None:
    """On the meta device, where its arguments are checked and shapes are found."""
    q, seen = sequences("meta", torch.bfloat16)
    assert flash(q, seen).shape == q.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_heads_of_different_lengths_on_a_gpu() -> None:
    device = torch.device("cuda")
    ragged = ragged_backend("varlen", device, torch.bfloat16)
    assert ragged is not None
    q, seen = sequences(device, torch.bfloat16)
    torch.testing.assert_close(ragged(q, seen), one_by_one(q, seen), atol=2e-2, rtol=2e-2)
