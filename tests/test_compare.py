"""python -m dummy.compare: what changed between two roles files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dummy.compare import compare, main
from dummy.roles import HeadRoles, Role


def write(path: Path, codes: list[list[int]], nested: bool = False) -> str:
    roles = HeadRoles.from_codes(codes).to_json()
    path.write_text(json.dumps({"head_roles": roles} if nested else roles))
    return str(path)


def test_a_difference_counts_moves() -> None:
    found = compare(HeadRoles.from_codes([[0, 1, 2], [2, 2, 1]]), HeadRoles.from_codes([[0, 2, 2], [1, 2, 0]]))
    assert found.moves[Role.NEIGHBOR] == {Role.SINK: 1, Role.NEIGHBOR: 0, Role.DUMMY: 1}
    assert found.dummy_overlap == pytest.approx(2 * 2 / 6)
    assert [(layer, head) for layer, head, *_ in found.changed] == [(0, 1), (1, 0), (1, 2)]
    assert found.heads == 6


def test_two_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a.json", [[0, 1, 2], [2, 2, 1]])
    b = write(tmp_path / "b.json", [[0, 2, 2], [2, 2, 1]], nested=True)
    assert main([a, b]) == 0
    out = capsys.readouterr().out
    assert "same role: 5 of 6 heads (83.3 %)" in out and "layer 0: head 1 neighbor -> dummy" in out
    assert main([a, a]) == 0
    assert "overlap of the dummy sets: 1.000" in capsys.readouterr().out


def test_files_that_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a.json", [[0, 1, 2], [2, 2, 1]])
    b = write(tmp_path / "b.json", [[0, 1, 2]])
    assert main([a, b]) == 2
    assert "is for 1 layers of 3 heads" in capsys.readouterr().err
    assert main([a, str(tmp_path / "none.json")]) == 2
    assert "none.json: there is no such roles file" in capsys.readouterr().err
