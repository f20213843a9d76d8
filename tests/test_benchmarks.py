"""Counted operations are the published ones and those that run; the benchmarks print what they promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import dit, policies
from benchmarks.counting import (
    clean_pass_operations,
    forward_operations,
    linear_operations,
    self_attention_operations,
    text_attention_operations,
)
from benchmarks.steady import POLICIES, STEPS, SteadyBlock, build_model
from wan.config import WAN_1_3B, ModelConfig
from wan.geometry import LatentGeometry

SMALL = ModelConfig(dim=64, ffn_dim=128, num_heads=4, num_layers=3, text_dim=32, text_len=16, freq_dim=32)


@pytest.mark.parametrize(
    ("size", "linear", "text", "per_frame"),
    [((60, 104), 11.7, 0.44, 1.346), ((90, 160), 27.0, 1.02, 7.17), ((136, 240), 61.2, 2.31, 36.8)],
)
def test_counts_at_full_size(size: tuple[int, int], linear: float, text: float, per_frame: float) -> None:
    geometry = LatentGeometry(*size, 21, 3)
    tokens = geometry.tokens_per_block
    assert linear_operations(WAN_1_3B, tokens) / 1e12 == pytest.approx(linear, rel=0.01)
    assert text_attention_operations(WAN_1_3B, tokens) / 1e12 == pytest.approx(text, rel=0.01)
    assert self_attention_operations(WAN_1_3B, geometry, 360) / 1e12 == pytest.approx(per_frame, rel=0.01)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ((q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("policy", POLICIES)
def test_counts_are_what_runs(policy: str) -> None:
    geometry = LatentGeometry(4, 6, 21, 3)
    model = build_model(SMALL, torch.device("cpu"))
    model.attention = plain_attention  # the counter does not know the CPU's fused kernel
    block = SteadyBlock(model, geometry, policy)
    frames = block.head_frames
    with FlopCounterMode(display=False) as counter:
        block.run()
    assert counter.get_total_flops() == pytest.approx(block.operations, rel=1e-6)
    expected = len(STEPS) * forward_operations(SMALL, geometry, frames) + clean_pass_operations(SMALL, geometry, frames)
    assert block.operations == expected


def test_packed_sees_four_and_a_half_frames() -> None:
    """Half of the heads dummy, the rest evenly sink and neighbour: the setting of the published figures."""
    config = ModelConfig(dim=64, ffn_dim=128, num_heads=4, num_layers=4, text_dim=32, text_len=16)
    block = SteadyBlock(build_model(config, torch.device("cpu")), LatentGeometry(4, 6, 21, 3), "packed")
    assert block.head_frames / 16 == 4.5


def test_the_policy_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    arguments = ["--dim", "64", "--layers", "1", "--size", "8", "12", "--device", "cpu", "--json", str(out)]
    assert policies.main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*POLICIES, "predicted", "reached"))
    rows = json.loads(out.read_text())["rows"]
    assert [row["policy"] for row in rows] == list(POLICIES)
    assert all(row["block_ms"] > 0 for row in rows)


def test_the_transformer_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    arguments = ["--dim", "64", "--layers", "1", "--policy", "packed", "--engine", "eager", "--repeat", "1"]
    assert dit.main([*arguments, "--device", "cpu", "--json", str(out)]) == 0
    assert "ceilings:" in capsys.readouterr().out
    content = json.loads(out.read_text())
    assert content["torch"] == torch.__version__
    (row,) = content["rows"]
    assert row["launches"] > 100
    assert row["fps"] == pytest.approx(12 / row["block_ms"] * 1000)
