"""The rules of the house, read off the source: layers, top-level names, sizes of files and functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ["scripts", "pipeline", "dummy", "wan", "utils"]
SCRIPTS = ["inference.py", "interactive_inference.py", "sample_vbench.py"]
MAY_NOT_SEE = {"scripts": {"dummy", "wan"}, "utils": {"wan", "dummy", "pipeline"}, "wan": {"dummy", "pipeline"}}
MAY_NOT_SEE |= {"dummy": {"pipeline"}, "pipeline": set()}
LIBRARY = [path for layer in LAYERS[1:] for path in sorted((ROOT / layer).glob("**/*.py"))]
SOURCES = [*LIBRARY, *(ROOT / name for name in SCRIPTS)]


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_to_the_right(path: Path) -> None:
    script = path.parent == ROOT or path.name == "__main__.py"  # `python -m dummy.atlas` may need the whole pipeline
    layer = "scripts" if script else path.relative_to(ROOT).parts[0]
    scripts = set() if layer == "scripts" else {name.removesuffix(".py") for name in SCRIPTS}
    forbidden = MAY_NOT_SEE[layer] | {"tests", "benchmarks"} | scripts
    found = {name.split(".")[0] for name in imported(path)}
    assert not found & forbidden


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, f"{node.name} does not fit on a page"


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_does_not_print(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def test_only_the_configuration_sees_all_layers_settings() -> None:
    settings = {"dummy.config", "wan.config"}
    seers = [path for path in LIBRARY if settings <= set(imported(path)) and path.parent.name != "dummy"]
    assert [path.name for path in seers] == ["config.py"]
