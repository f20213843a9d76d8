"""Rotary positions and the denoising schedule against plain formulas."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from pipeline.runtime.schedule import DenoisingSchedule
from wan.attention.rope import RotaryEmbedding, Rotation, rotate

CPU = torch.device("cpu")


def angle(position: tuple[int, int, int], pair: int, width: int) -> float:
    """The angle of one pair of channels at (frame, row, column), from the definition."""
    axis = width // 6
    pairs = [width // 2 - 2 * axis, axis, axis]
    for place, count in zip(position, pairs, strict=True):
        if pair < count:
            return place * 10000.0 ** (-2 * pair / (2 * count))
        pair -= count
    raise AssertionError


@pytest.mark.parametrize("width", [6, 12, 16, 64, 128])
def test_every_pair_turns_by_its_axis(width: int) -> None:
    start, grid = 1500, (3, 4)  # past the 1024 frames at which published tables end
    table = RotaryEmbedding(width).table(start, 2, grid, CPU)
    x = torch.randn(1, 24, 2, width, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, table)
    for token in (0, 5, 23):
        frame, row, column = start + token // 12, token % 12 // 4, token % 4
        for pair in range(width // 2):
            theta = angle((frame, row, column), pair, width)
            a, b = x[0, token, 1, 2 * pair].item(), x[0, token, 1, 2 * pair + 1].item()
            expected = a * math.cos(theta) - b * math.sin(theta), a * math.sin(theta) + b * math.cos(theta)
            assert turned[0, token, 1, 2 * pair : 2 * pair + 2].tolist() == pytest.approx(expected, abs=2e-6)


@torch.inference_mode()
def test_compiled_rotation_leaves_no_float32_in_memory() -> None:
    """Half-precision keys are turned in float32 within a kernel; sums and angles alone are stored in it."""
    torch._dynamo.reset()
    x, turn = torch.randn(1, 40, 256).bfloat16(), Rotation(torch.randn(40, 1, 32), torch.randn(40, 1, 32))

    def normed_and_turned(x: torch.Tensor) -> torch.Tensor:
        return rotate(torch.nn.functional.rms_norm(x, (256,)).view(1, 40, 4, 64), turn)

    compiled = torch.compile(normed_and_turned, fullgraph=True, dynamic=False)
    out, (code,) = run_and_get_code(compiled, x)
    buffers = re.findall(r"= empty_strided_cpu\(\(([\d, ]+)\), \(.*?\), torch\.(\w+)\)", code)
    assert "bfloat16" in {kind for _, kind in buffers}
    assert all(math.prod(map(int, size.split(", "))) < x.numel() for size, kind in buffers if kind == "float32")
    torch.testing.assert_close(out, normed_and_turned(x), atol=0.1, rtol=0.02)


def test_a_shift_moves_the_frame_alone() -> None:
    rope = RotaryEmbedding(24)
    x = torch.randn(1, 12, 1, 24, generator=torch.Generator().manual_seed(0))
    moved = rotate(rotate(x, rope.table(3, 1, (3, 4), CPU)), rope.frame_shift(40, CPU))
    torch.testing.assert_close(moved, rotate(x, rope.table(43, 1, (3, 4), CPU)), atol=1e-5, rtol=1e-5)


def test_positions_far_out_are_exact() -> None:
    """After 20 minutes (frame 4800 on) angles are still those of float64, not of a float32 product."""
    table = RotaryEmbedding(128).table(100_000, 1, (1, 1), CPU)
    assert table.cos[0, 0, 0].item() == pytest.approx(math.cos(100_000.0), abs=1e-6)
    assert table.cos[0, 0, 5].item() == pytest.approx(math.cos(100_000.0 * 10000 ** (-5 / 22)), abs=1e-6)


def test_the_published_schedule() -> None:
    schedule = DenoisingSchedule.build([1000, 750, 500, 250], 5.0, warp=True)
    assert schedule.timesteps == pytest.approx([1000, 937.5, 833.3333, 625])
    assert schedule.sigmas == pytest.approx([1, 0.9375, 0.8333333, 0.625])


def test_unwarped_steps_are_timesteps_with_the_nearest_sigma_of_the_table() -> None:
    schedule = DenoisingSchedule.build([1000, 757, 522], 5.0, warp=False)
    assert schedule.timesteps == (1000.0, 757.0, 522.0)
    table = [5 * u / (1 + 4 * u) for u in (1 - i / 1000 for i in range(1000))]
    for step, sigma in zip((1000, 757, 522), schedule.sigmas, strict=True):
        assert sigma in table
        assert abs(1000 * sigma - step) == min(abs(1000 * entry - step) for entry in table)


def test_flow_prediction_and_renoising_undo_each_other() -> None:
    schedule = DenoisingSchedule.build([1000, 500], 5.0, warp=True)
    x0, noise = torch.randn(2, 1, 3, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    x = schedule.renoise(x0, noise, 1)
    torch.testing.assert_close(schedule.predict_x0(x, noise - x0, 1), x0)
    torch.testing.assert_close(schedule.predict_x0(noise, noise - x0, 0), x0)
