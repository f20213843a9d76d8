"""The rules of the house, read off the source: layers, floors, circles, sizes of files and functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ["scripts", "studio", "pipeline", "dummy", "wan", "utils"]
SCRIPTS = ["inference.py", "interactive_inference.py", "sample_vbench.py"]
MAY_NOT_SEE = {"scripts": {"dummy", "wan", "studio"}, "studio": {"dummy", "wan"}, "pipeline": {"studio"}}
MAY_NOT_SEE |= {"dummy": {"studio", "pipeline"}, "wan": {"studio", "pipeline", "dummy"}}
MAY_NOT_SEE |= {"utils": {"studio", "pipeline", "dummy", "wan"}}
LIBRARY = [path for layer in LAYERS[1:] for path in sorted((ROOT / layer).glob("**/*.py"))]
# Within a layer, from the ground up: a file imports from its own room or from a lower floor.
FLOORS = {
    "wan": [{"geometry", "cuda_graphs"}, {"config"}, {"attention", "checkpoints"}, {"text", "transformer", "vae"}],
    "dummy": [{"budget", "presets", "retentions", "passes"}, {"roles", "config", "frame_attention", "teacache"}],
    "pipeline": [{"config"}, {"runtime"}, {"planning"}, {"session"}, {"assembly"}, {"video_files", "repeating"}],
}
FLOORS["pipeline"] += [{"atlas", "vbench"}, {"calibrate"}]
FLOORS["dummy"] += [{"observed"}, {"equal_cost", "compare", "calibration"}, {"policy"}, {"policies"}, {"atlas"}]
ROOMED = [path for path in LIBRARY if path.relative_to(ROOT).parts[0] in FLOORS and path.name != "__init__.py"]
TELLING = {"studio/client.py", "studio/serving.py"}  # commands, which say where the page and the video are
SILENT = [path for path in LIBRARY if str(path.relative_to(ROOT)) not in TELLING]
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
    layer = "scripts" if path.parent == ROOT else path.relative_to(ROOT).parts[0]
    scripts = set() if layer == "scripts" else {name.removesuffix(".py") for name in SCRIPTS}
    forbidden = MAY_NOT_SEE[layer] | {"tests", "benchmarks", "shapes"} | scripts
    found = {name.split(".")[0] for name in imported(path)}
    assert not found & forbidden


def floor(layer: str, module: Sequence[str]) -> int:
    """The floor on which the room of pipeline.ROOM... (or the file pipeline.FILE) stands."""
    room = module[0]
    return next(number for number, rooms in enumerate(FLOORS[layer]) if room in rooms)


@pytest.mark.parametrize("path", ROOMED, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_to_the_own_room_or_down(path: Path) -> None:
    layer, *own = path.relative_to(ROOT).with_suffix("").parts
    for name in imported(path):
        first, *module = name.split(".")
        if first == layer and module and module[0] != own[0]:
            assert floor(layer, module) < floor(layer, own), f"{path} imports {name}, which stands no lower"


def test_no_import_goes_in_a_circle() -> None:
    graph = {}
    for path in LIBRARY:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[module] = {name for name in imported(path) if name.split(".")[0] in LAYERS}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, f"{node.name} does not fit on a page"


@pytest.mark.parametrize("path", SILENT, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_does_not_print(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def test_only_the_configuration_sees_all_layers_settings() -> None:
    settings = {"dummy.config", "wan.config"}
    seers = [path for path in LIBRARY if settings <= set(imported(path)) and path.relative_to(ROOT).parts[0] != "dummy"]
    assert [path.name for path in seers] == ["settings.py"]
