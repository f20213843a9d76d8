"""The tracker counts each storage once, while it lives."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from utils.memory import PeakTracker, format_bytes
from utils.pinned_buffers import PIECE, PinnedBuffers

KIB = 1024
DEVICES = ["cpu", "meta"]


@pytest.mark.parametrize("device", DEVICES)
def test_known_sequence(device: str) -> None:
    with PeakTracker() as memory:
        a = torch.empty(256, device=device)  # 1 KiB of float32
        b = a + 1
        assert memory.current == 2 * KIB
        del a
        assert memory.current == KIB
        c = torch.cat([b, b, b])
        assert memory.current == 4 * KIB
        del b, c
        d = torch.ones(256, dtype=torch.float64, device=device)
        assert memory.current == 2 * KIB
    assert memory.peak == 4 * KIB
    del d
    assert memory.current == 0


@pytest.mark.parametrize("device", DEVICES)
def test_views_and_in_place_add_nothing(device: str) -> None:
    with PeakTracker() as memory:
        a = torch.zeros(16, 16, device=device)
        views = [a.t(), a[3], a.view(-1), a.unsqueeze(0).expand(9, 16, 16), *a.unbind(0), *a.split(4)]
        a.add_(1).mul_(2)
        a[0].fill_(5)
        a.t().relu_()
        assert memory.current == memory.peak == KIB
        del a
        assert memory.current == KIB  # the views hold the storage
        del views
        assert memory.current == 0


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_from_outside_do_not_count(device: str) -> None:
    weight = torch.zeros(16, 16, device=device)
    cache = torch.zeros(64, 16, device=device)
    with PeakTracker() as memory:
        view = weight.t()
        cache[:16].copy_(weight)
        cache.add_(1)
        torch.add(weight, 1, out=cache[:16])
        assert memory.current == memory.peak == 0
        product = weight @ view
        assert memory.current == KIB
    del product
    assert memory.current == 0


def test_lists_tuples_none_and_host_values() -> None:
    with PeakTracker() as memory:
        a = torch.arange(256, dtype=torch.float32)
        values, indices = a.topk(256)  # a tuple: 1 KiB of values, 2 KiB of indices
        assert memory.current == 4 * KIB
        assert torch._foreach_add_([values, a], 1.0) is not None
        new = torch._foreach_add([values, a], 1.0)  # a list
        assert memory.current == 6 * KIB
        assert float(a.sum()) > 0
        del a, values, indices, new
    assert memory.current == 0


def test_tensor_from_data_counts() -> None:
    with PeakTracker() as memory:
        a = torch.tensor([1.0] * 256)
        assert memory.current == KIB
    del a
    assert memory.current == 0


def test_resized_storage_counts_with_its_new_size() -> None:
    with PeakTracker() as memory:
        a = torch.empty(256)
        a.resize_(1024)
        assert memory.current == 4 * KIB
    del a
    assert memory.current == 0


def test_peak_can_start_anew() -> None:
    with PeakTracker() as memory:
        a = torch.empty(2560)
        del a
        b = torch.empty(256)
        memory.reset_peak()
        assert memory.peak == KIB
    del b


def test_model_on_meta_needs_what_it_needs_on_the_cpu() -> None:
    def peak(device: str, grad: bool) -> int:
        model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8)).to(device)
        x = torch.zeros(10, 32, device=device)
        with torch.set_grad_enabled(grad), PeakTracker() as memory:
            y = model(x)
        del y
        gc.collect()
        assert memory.current == 0
        return memory.peak

    assert peak("meta", False) == peak("cpu", False)
    # Without gradients: two neighbouring activations [10, 64] at a time, and layer norm's statistics.
    assert 2 * 2560 <= peak("meta", False) <= 2 * 2560 + 2 * 40
    assert peak("meta", True) > 3 * 2560


def test_format_bytes() -> None:
    assert format_bytes(0) == "0.0 MiB"
    assert format_bytes(1024**3 - 1) == "1024.0 MiB"
    assert format_bytes(3 * 1024**3 // 2) == "1.50 GiB"
    assert format_bytes(10 * 1024**2) == "10.0 MiB"


def test_tensors_on_the_host_share_pieces_and_nothing_else() -> None:
    host = PinnedBuffers(page_locked=False)
    small = [host.zeros((3, 5), dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)]
    assert [tensor.shape for tensor in small] == [(3, 5)] * 3
    assert len({tensor.untyped_storage().data_ptr() for tensor in small}) == 1
    for value, tensor in enumerate(small, 1):
        assert not tensor.any()
        tensor.fill_(value)
    assert [tensor.unique().tolist() for tensor in small] == [[1], [2], [3]]
    large = host.zeros((PIECE + 1,), torch.uint8)
    assert large.untyped_storage().nbytes() == PIECE + 1
    assert host.zeros((1,), torch.uint8).untyped_storage().data_ptr() == small[0].untyped_storage().data_ptr()


def test_results_on_meta_are_found_once_and_are_the_same() -> None:
    """The second round goes by what the first has found: layouts, views, what is written in place, and errors."""

    def round_of_operators() -> list[object]:
        x, y = torch.empty(2, 6, 4, device="meta").transpose(1, 2), torch.empty(4, 6, device="meta")
        made = [x + y, x + 1, x + 1.5, x.to(torch.float16), x.double(), x.contiguous(), y.contiguous(), x[0]]
        made += [*x.reshape(2, 4, 6).max(-1), torch.cat([x, x]), x == 1, torch.full((3,), 2, device="meta")]
        made += x.split(3)
        whole = torch.ones(3, dtype=torch.int64, device="meta")
        made += [whole + 1, whole + 1.0, whole + True, whole == 1]  # equal numbers of other types
        made += [z.sigmoid() for z in (x, x.contiguous(), x.half())]  # equal shapes that lie in memory otherwise
        made.append(x.mul_(2))
        said: list[object] = [(t.shape, t.stride(), t.dtype, t.untyped_storage().nbytes()) for t in made]
        said += [t.untyped_storage()._cdata in (x.untyped_storage()._cdata, y.untyped_storage()._cdata) for t in made]
        with pytest.raises(RuntimeError):
            x @ x
        x.resize_(4096)
        return [*said, made[-1] is x, x.shape]

    plain = round_of_operators()
    for _ in range(2):
        with torch.inference_mode(), PeakTracker():
            assert round_of_operators() == plain


def test_what_was_found_on_meta_is_for_meta_alone() -> None:
    for device in ("meta", "cpu", "meta", "cpu"):
        with PeakTracker() as memory:
            a = torch.ones(256, device=device)
            b = a + a
        assert memory.current == 2 * KIB and b.device.type == device
        assert device == "meta" or b.tolist() == [2.0] * 256
