"""Counted operations are the published ones and those that run; the benchmarks print what they promise."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import dit, merged, policies, tables
from benchmarks.steady import POLICIES, STEPS, SteadyBlock, build_model, typical_table
from benchmarks.trace import CROSS, KINDS, SELF, breakdown
from tests import conformance
from wan.config import WAN_1_3B, ModelConfig
from wan.geometry import LatentGeometry
from wan.transformer.operations import (
    clean_pass_operations,
    forward_operations,
    linear_operations,
    self_attention_operations,
    text_attention_operations,
)

ROOT = Path(__file__).parents[1]
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
    # A table's last layer keeps more or less than the mean, and a clean pass leaves out its attention.
    near = 2e-3 if policy == "calibrated" else 1e-6
    assert counter.get_total_flops() == pytest.approx(block.operations, rel=near)
    expected = len(STEPS) * forward_operations(SMALL, geometry, frames) + clean_pass_operations(SMALL, geometry, frames)
    assert block.operations == expected


def test_packed_sees_four_and_a_half_frames() -> None:
    """Half of the heads dummy, the rest evenly sink and neighbour: the setting of the published figures."""
    config = ModelConfig(dim=64, ffn_dim=128, num_heads=4, num_layers=4, text_dim=32, text_len=16)
    block = SteadyBlock(build_model(config, torch.device("cpu")), LatentGeometry(4, 6, 21, 3), "packed")
    assert block.head_frames / 16 == 4.5


def test_the_typical_table_keeps_as_much_as_packed() -> None:
    table = typical_table(WAN_1_3B)
    assert table.mean_frames(18) == 1.5 and table.shape == (30, 12)
    assert [len({kept.total for kept in row}) for row in table.rows[:3]] == [3, 6, 5]
    assert [kept.total for kept in table.rows[0]] == [0, 0, 1, 0, 0, 0, 0, 4, 0, 1, 0, 0]  # equal ones lie scattered


def test_the_policy_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    arguments = ["--dim", "256", "--layers", "1", "--size", "8", "12", "--device", "cpu", "--json", str(out)]
    assert policies.main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*POLICIES, "predicted", "reached"))
    rows = json.loads(out.read_text())["rows"]
    assert [row["policy"] for row in rows] == list(POLICIES)
    assert all(row["block_ms"] > 0 for row in rows)


def test_the_transformer_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    arguments = ["--resolution", "tiny", "--dim", "64", "--layers", "2", "--repeat", "1", "--profile"]
    arguments += ["--policy", "full,packed,calibrated", "--engine", "eager", "--attention", "auto,fa3"]
    assert dit.main([*arguments, "--device", "cpu", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "left out: attention: 'fa3' needs an NVIDIA GPU" in printed
    assert "tiny eager: packed is " in printed and "times as fast as full, operations predict 1." in printed
    content = json.loads(out.read_text())
    assert content["torch"] == torch.__version__
    assert content["command"].startswith("benchmarks.dit --resolution tiny")
    assert content["ceilings"]["product_tflops"] > 0
    full, packed, calibrated = content["rows"]
    assert re.search(
        f"tiny eager, sdpa: calibrated [0-9.]+ ms and {calibrated['launches']} launches with 3.50 frames a head, "
        f"packed [0-9.]+ ms and {packed['launches']} with 4.00",
        printed,
    )
    assert (full["attention"], full["frames_per_head"], packed["frames_per_head"]) == ("sdpa", 18, 4.0)
    assert packed["launches"] > 100
    assert packed["fps"] == pytest.approx(12 / packed["block_ms"] * 1000)
    assert packed["cache_bytes"] < full["cache_bytes"]
    assert tables.dit(content).splitlines()[3].startswith("| tiny | packed | eager, sdpa, fp32 | 4.0 |")
    assert set(full["ms_by_kind"]) == set(KINDS)
    assert all(full["ms_by_kind"][kind] > 0 for kind in KINDS if kind not in ("attention",))


def test_fp8_beside_what_it_is_made_from(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--resolution tiny --dim 64 --layers 1 --policy packed --engine eager --repeat 1 --precision auto,fp8"
    assert dit.main([*arguments.split(), "--device", "cpu"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "off by" in line]
    assert line.startswith("tiny packed eager: fp8 is off by ")
    assert 0.01 < float(line.split()[-1].rstrip("%")) < 10


def test_the_transformer_needs_neither_encoders_nor_writers() -> None:
    """Machines to measure on may be bare: torch and PyYAML have to do."""
    program = """
import sys
absent = "imageio_ffmpeg transformers diffusers omegaconf ftfy tokenizers tqdm safetensors huggingface_hub peft"
sys.modules.update(dict.fromkeys(absent.split()))
from benchmarks import dit
dit.main("--resolution tiny --dim 64 --layers 1 --policy packed --engine eager --repeat 1 --device cpu".split())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "packed" in done.stdout


def event(category: str, name: str, start: float, duration: float) -> dict[str, object]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "tid": 1}


def test_kinds_of_a_trace_from_a_gpu() -> None:
    flash = "void cutlass::device_kernel<flash::FlashAttnFwdSm90<...>>"
    events = [
        event("cuda_runtime", "cudaLaunchKernelExC", 0, 3),
        event("cuda_driver", "cuLaunchKernel", 4, 3),
        event("cuda_runtime", "cudaGraphLaunch", 8, 3),
        event("cuda_runtime", "cudaMemcpyAsync", 12, 3),
        event("gpu_user_annotation", SELF, 19, 12),
        event("gpu_user_annotation", CROSS, 39, 12),
        event("kernel", flash, 20, 10),
        event("kernel", "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT", 30, 9),
        event("kernel", "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128", 40, 8),
        event("kernel", "triton_poi_fused__to_copy_addmm_gelu_2", 50, 7),
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 57, 6),
        event("kernel", "void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", 63, 5),
        event("kernel", flash, 70, 4),
    ]
    found = breakdown(events)
    spent = {kind: round(1000 * value) for kind, value in found.milliseconds.items()}
    expected = {"linear": 9, SELF: 10, CROSS: 8, "attention": 4, "elementwise": 7, "copies": 11, "idle": 1 + 2 + 2}
    assert spent == expected
    assert (found.launches, found.kernels) == (3, 7)


def test_an_operators_own_time_is_without_that_of_what_it_calls() -> None:
    events = [
        event("user_annotation", "whole", 0, 100),
        event("user_annotation", SELF, 10, 30),
        event("cpu_op", "aten::scaled_dot_product_attention", 12, 26),
        event("cpu_op", "aten::copy_", 14, 6),
        event("cpu_op", "aten::linear", 50, 20),
        event("cpu_op", "aten::addmm", 51, 18),
        event("cpu_op", "aten::add", 80, 5),
    ]
    spent = {kind: round(1000 * value) for kind, value in breakdown(events).milliseconds.items()}
    assert spent == {
        "linear": 20,
        SELF: 24,  # what the range itself takes is the attention's, too
        CROSS: 0,
        "attention": 0,
        "elementwise": 5,
        "copies": 6,
        "idle": 45,
    }


STAND_IN = """#!/usr/bin/env bash
# Stands for Python: notes what it is to run, and is done, but for what is compiled, which takes longer than there is.
echo "$*" >> "$0.log"
case "$*" in *"engine compiled"*) exec sleep 60 ;; esac
"""


def test_all_for_a_gpu_in_one_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a CPU, with less of everything; a part that runs out of time costs no other."""
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    command = ["benchmarks/gpu.sh", str(tmp_path / "out"), "--device", "cpu", "--small"]
    environment = {**os.environ, "PYTHON": str(python), "LIMIT": "8"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    lines = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == [
        "machine",
        "vectors_eager_fp32",
        "vectors_eager_bf16",
        "vectors_compiled_fp32",
        "training",
        "tests_gpu",
        "tiny",
        "merged",
        "vae",
        "end_to_end",
    ]
    assert done.stdout.splitlines() == lines
    endings = [line[33:].strip() for line in lines]
    assert endings[0] == "ok" and set(endings[1:4]) <= {"ok", "out of time", "left out, no time"}, done.stderr
    assert set(endings[4:]) == {"left out, no time"}
    assert done.returncode == 0
    ran = Path(f"{python}.log").read_text().splitlines()
    assert ran[0] == "-m torch.utils.collect_env"
    assert conformance.main(ran[1].split()[2:]) == 0
    assert "latents" in capsys.readouterr().out


def test_long_context_costs_what_the_window_does() -> None:
    config = ModelConfig(dim=64, ffn_dim=128, num_heads=4, num_layers=4, text_dim=32, text_len=16)
    model = build_model(config, torch.device("cpu"))
    long, window, full = (SteadyBlock(model, LatentGeometry(4, 6, 21, 3), name) for name in ("long", "window", "full"))
    assert long.head_frames == window.head_frames == 12 * 16
    # The 4 neighbour heads have all of their frames: what 12 heads with one frame leave of 9 a head. The rest stays.
    assert long.start == (9 * 16 - 12) / 4
    assert (window.start, full.start) == (15, 15)


def test_merged_passes_are_measured_both_ways(tmp_path: Path) -> None:
    path = tmp_path / "merged.json"
    tiny = ["--device", "cpu", "--resolution", "tiny", "--dim", "64", "--layers", "1", "--repeat", "1"]
    assert merged.main([*tiny, "--json", str(path)]) == 0
    made = json.loads(path.read_text())
    assert made["most_saved_ms"] == pytest.approx(made["apart_ms"] - made["merged_ms"])
    assert made["ratio"] == pytest.approx(made["apart_ms"] / made["merged_ms"])
