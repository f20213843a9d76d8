"""The one attention: its choice of backend, and that it is plain softmax attention."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from tests.test_generator import GEOMETRY, ROLES, generator, latents, start
from tests.tiny import segments, tiny_model
from utils.errors import InputError
from utils.seed import ZeroNoise
from wan.attention import backends, varlen
from wan.attention.backends import FLASH_MODULES, attention_backend, choose_backend, flash_function, sdpa
from wan.attention.varlen import RaggedKV, flash, flash3, ragged_backend

CPU, GPU = torch.device("cpu"), torch.device("cuda")


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


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder from which packages are imported, seen by a Hopper GPU."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: backends.HOPPER)
    flash_function.cache_clear()
    backends.usable.cache_clear()
    yield tmp_path
    for module in FLASH_MODULES.values():
        sys.modules.pop(module, None)
    flash_function.cache_clear()
    backends.usable.cache_clear()


BROKEN = {
    "raise ImportError('flash_attn_3_cuda.so: undefined symbol: _ZN3c10')": "undefined symbol",
    "raise OSError('libcudart.so.12: cannot open shared object file')": "cannot open shared object file",
    "import flash_attn_3_cuda": "No module named 'flash_attn_3_cuda'",
    "raise RuntimeError('FlashAttention needs a newer GPU\\nand more')": "needs a newer GPU",
    "": "has no attribute 'flash_attn_func'",
}


@pytest.mark.parametrize("content", BROKEN)
def test_a_package_that_does_not_load_is_passed_over(
    content: str, packages: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (packages / "flash_attn_interface.py").write_text(content)
    for _ in range(3):
        assert choose_backend(GPU, torch.bfloat16) == "cudnn"
        assert ragged_backend("varlen", GPU, torch.bfloat16) is flash
        assert attention_backend("auto", GPU, torch.bfloat16) is backends.cudnn
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.startswith(
        "attention: fa3 is passed over: it needs flash_attn_interface, which does not load"
    )
    assert BROKEN[content] in record.message and "\n" not in record.message
    with pytest.raises(InputError, match=r"attention: 'fa3' needs the package flash_attn_interface, which does not"):
        attention_backend("fa3", GPU, torch.bfloat16)


def test_a_package_that_is_not_there_is_no_news(packages: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert choose_backend(GPU, torch.bfloat16) == "cudnn"
    assert not caplog.records
    with pytest.raises(InputError, match=r"flash_attn_interface, which is not installed; use 'auto'"):
        attention_backend("fa3", GPU, torch.bfloat16)


def test_a_package_that_loads_is_taken(packages: Path) -> None:
    lines = (
        "def flash_attn_func(q, k, v): return q + 1, None",
        "def flash_attn_varlen_func(q, *_, **__): return q - 1",
    )
    (packages / "flash_attn_interface.py").write_text("\n".join(lines))
    assert choose_backend(GPU, torch.bfloat16) == "fa3"
    zeros = torch.zeros(2, 4, 3, 64)
    assert torch.equal(attention_backend("auto", GPU, torch.bfloat16)(zeros, zeros, zeros), zeros + 1)
    ragged = ragged_backend("varlen", GPU, torch.bfloat16)
    assert ragged is not None
    assert torch.equal(ragged(zeros, sequences("cpu", torch.float32)[1]), zeros - 1)


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


@pytest.mark.parametrize("public", [True, False])
def test_pytorchs_flash_attention_takes_the_call(public: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, where its arguments are checked and shapes are found; by the public name, where that takes
    lengths, and by the operator below it."""
    if public and not varlen._public_takes_lengths():
        pytest.skip("this PyTorch's varlen_attn takes no lengths")
    monkeypatch.setattr(varlen, "_public_takes_lengths", lambda: public)
    q, seen = sequences("meta", torch.bfloat16)
    assert flash(q, seen).shape == q.shape


def unmasked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: torch.Tensor, starts: torch.Tensor, *_: int,
    seqused_k: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """FlashAttention 3's `flash_attn_varlen_func` in what it does with rows that are not seen: their scores are left
    out, but their values are multiplied by zero."""
    out = torch.empty_like(q)
    for i, length in enumerate(seqused_k):
        own, all_of_it = slice(*queries[i : i + 2]), slice(*starts[i : i + 2])
        scores = q[own, 0] @ k[all_of_it, 0].T * q.shape[-1] ** -0.5
        scores[:, length:] = -torch.inf
        out[own, 0] = scores.softmax(-1) @ v[all_of_it, 0]
    return out


@pytest.fixture
def memory_full_of_nan() -> Iterator[None]:
    """Whatever is allocated and not written holds no numbers."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("kind", "roles", "relative"),
    [("full", None, False), ("window", None, True), ("packed", ROLES, False), ("packed", None, True)],
)
def test_rows_that_no_head_sees_are_numbers(memory_full_of_nan: None, kind: str, roles: object, relative: bool) -> None:
    """A kernel without a mask on the values gives what the masked one does, for videos one after the other, of which
    one ended in no numbers."""
    assert torch.empty(3).isnan().all()
    made = generator(tiny_model(), kind, roles, window=9, relative_rope=relative)  # type: ignore[arg-type]
    made.model.use_attention("varlen")
    expected = latents(start(made, 1, starts=(0, 6)))
    other = generator(tiny_model(), kind, roles, window=9, relative_rope=relative)  # type: ignore[arg-type]
    other.model.ragged = flash3(unmasked)
    torch.testing.assert_close(latents(start(other, 1, starts=(0, 6))), expected, atol=1e-4, rtol=1e-4)
    spoilt = other.start(GEOMETRY, segments(other.model), NoNumbers())
    assert latents(spoilt).isnan().any()
    torch.testing.assert_close(latents(start(other, 1, starts=(0, 6))), expected, atol=1e-4, rtol=1e-4)


class NoNumbers(ZeroNoise):
    """The noise of a video that goes wrong."""

    def normal(self, shape: Sequence[int]) -> torch.Tensor:
        return super().normal(shape) + torch.nan


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_heads_of_different_lengths_on_a_gpu() -> None:
    device = torch.device("cuda")
    ragged = ragged_backend("varlen", device, torch.bfloat16)
    assert ragged is not None
    q, seen = sequences(device, torch.bfloat16)
    torch.testing.assert_close(ragged(q, seen), one_by_one(q, seen), atol=2e-2, rtol=2e-2)
