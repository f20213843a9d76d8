"""What `pip install -e .` asks for is what requirements.txt lists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def listed(name: str) -> list[str]:
    """The packages of a requirements file, without those that it includes."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-r"))]


def declared(key: str) -> list[str]:
    """A list of strings in pyproject.toml (Python 3.10 has no reader of TOML)."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(rf"^{key} = \[(.*?)\]\n", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return re.findall(r'"([^"]+)"', found[1])


def test_the_lists_agree_but_for_the_pin_of_torch() -> None:
    package, torch = declared("dependencies"), listed("requirements.txt")[0]
    assert package[0] == "torch>=2.11,<2.14" and torch == "torch==2.13.0"
    assert package[1:] == listed("requirements.txt")[1:]
    assert declared("studio") == listed("requirements-studio.txt")
    assert declared("dev") == listed("requirements-dev.txt")
