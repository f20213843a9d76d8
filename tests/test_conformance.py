"""The stored vectors, through the runner that also takes cases from elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import conformance

VECTORS = Path(__file__).parent / "data" / "vectors"
CASES = sorted(path for path in VECTORS.glob("*.safetensors") if not path.name.endswith("_a.safetensors"))
ROLLOUTS = [path for path in CASES if path.stem not in ("text_encoder", "vae")]


def test_all_vectors_are_here() -> None:
    assert len(CASES) == 23


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_vector(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.safetensors"
    assert conformance.main([str(path), "--out", str(out)]) == 0, capsys.readouterr().out
    expected = {name for name in load_file(path) if name.startswith("expect.")}
    assert expected == {f"expect.{name}" for name in load_file(out)}


@pytest.mark.parametrize("path", ROLLOUTS, ids=lambda path: path.stem)
def test_a_vector_with_one_launch_for_all_heads(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert conformance.main([str(path), "--attention", "varlen"]) == 0, capsys.readouterr().out


def test_a_vector_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    path = VECTORS / "packed_start1.safetensors"
    assert conformance.main([str(path), "--engine", "compiled"]) == 0, capsys.readouterr().out


def test_several_vectors_in_bf16(capsys: pytest.CaptureFixture[str]) -> None:
    """Rounding is within its own, relative limit; a result that is not comes out with the name of its case."""
    paths = [str(VECTORS / f"{name}.safetensors") for name in ("packed_start1", "window_sink")]
    assert conformance.main([*paths, "--precision", "bf16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "eager" in line] == ["packed_start1, eager, bf16", "window_sink, eager, bf16"]
    errors = [float(line.split()[1]) for line in lines if line.startswith("latents")]
    assert all(1e-3 < error < conformance.BF16_TOLERANCE for error in errors)


def test_roles_that_differ_decide_nothing_in_bf16(capsys: pytest.CaptureFixture[str]) -> None:
    expected = {"head_roles": torch.tensor([[0, 1]]), "latents": torch.ones(4)}
    others = {"head_roles": torch.tensor([[2, 1]]), "latents": 1.1 * torch.ones(4)}  # what follows from them, too
    assert conformance.report(others, expected, "bf16")
    assert not conformance.report({**expected, "latents": 1.1 * torch.ones(4)}, expected, "bf16")
    assert "latents          1.00e-01  above 3e-02" in capsys.readouterr().out


@pytest.mark.parametrize(
    "table",
    [[], [[[0, 1]] * 4] * 2, [[[0, 1]] * 3] * 3, [[[0]] * 4] * 3, [[[0, -1]] * 4] * 3, [[[0, True]] * 4] * 3, [3], 7],
)
def test_a_table_that_is_not_one_retention_a_head_is_refused(table: object) -> None:
    case, _ = conformance.read_case(VECTORS / "calibrated.safetensors")
    with pytest.raises(conformance.InputError, match=r"policy.table is no list of \[sink, recent\]"):
        conformance.context_policy({**case, "policy": {"kind": "calibrated", "table": table}})


def test_a_wrong_expectation_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case, tensors = conformance.read_case(VECTORS / "packed_start1.safetensors")
    tensors["expect.latents"][0, 7, 3, 2, 1] += 1e-3
    save_file(tensors, tmp_path / "case.safetensors", {"case": conformance.json.dumps(case)})
    (tmp_path / "weights_a.safetensors").symlink_to(VECTORS / "weights_a.safetensors")
    assert conformance.main([str(tmp_path / "case.safetensors")]) == 1
    assert "above" in capsys.readouterr().out


def test_a_case_without_expectations_of_another_size(tmp_path: Path) -> None:
    case, _ = conformance.read_case(VECTORS / "packed_start1.safetensors")
    case = {**case, "batch": 2, "num_frames": 8, "frames_per_block": 2, "height": 4, "width": 10}
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "noise": torch.randn(2, 8, 16, 4, 10, generator=generator),
        "renoise": torch.randn(12, 2, 2, 16, 4, 10, generator=generator),
        "prompt_embeds.0": torch.randn(2, 8, 24, generator=generator),
    }
    save_file(inputs, tmp_path / "case.safetensors", {"case": conformance.json.dumps(case)})
    (tmp_path / "weights_a.safetensors").symlink_to(VECTORS / "weights_a.safetensors")
    out = tmp_path / "out.safetensors"
    assert conformance.main([str(tmp_path / "case.safetensors"), "--out", str(out)]) == 0
    result = load_file(out)
    assert result["latents"].shape == (2, 8, 16, 4, 10)
    assert result["latents"].isfinite().all()
    assert set(result) >= {"flow.0", "flow.4", "head_roles", "frame_attention"}
