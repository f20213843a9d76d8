"""All that belongs to the small model's weights is made by one script."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ("shapes", "shapes_truth", "frontier", "frontier_calibrated", "compare_shapes", "sampling")
STAND_IN = f"""#!{sys.executable}
# Stands for Python: notes what it is to run, and writes it wherever a result is looked for.
import json, shlex, sys
from pathlib import Path
command = shlex.join(sys.argv[2:])
with open(sys.argv[0] + ".log", "a") as log:
    log.write(command + "\\n")
out = Path(dict(zip(sys.argv, sys.argv[1:])).get("--out", "none"))
for name in ("report.json", "frontier.json", "frontier.png", "frontier.svg", "comparison.json"):
    out.mkdir(parents=True, exist_ok=True)
    (out / name).write_text(json.dumps({{"command": command}}))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with nothing but the script, a stand-in for Python, and where results go."""
    for folder in ("benchmarks/results", "docs/shapes/calibrated"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "benchmarks" / "shapes.sh", tmp_path / "benchmarks")
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def remake(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": str(project / "python")}
    command = [str(project / "benchmarks" / "shapes.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_results_come_from_the_script(project: Path) -> None:
    """Each stored result of the small model has been made by the command that the script runs today."""
    done = remake(project, "made anew", "--only", "^[^p]")  # all but pictures, which need the whole project
    assert done.returncode == 0, done.stderr
    ran = (project / "python.log").read_text().splitlines()
    for name in RESULTS:
        stored = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["command"]
        assert any(_same(command, stored, project) for command in ran), stored
    for name in RESULTS[:-1]:
        found = (project / "benchmarks" / "results" / f"{name}.json").read_text()
        assert "FOLDER" in found and str(project) not in found


def test_a_part_of_it(project: Path) -> None:
    done = remake(project, "out", "--only", "comparison")
    assert [line.split()[-1] for line in done.stdout.splitlines()] == ["comparison"]
    assert len((project / "python.log").read_text().splitlines()) == 1


@pytest.mark.parametrize("arguments", [(), ("--only", "atlas"), ("out", "atlas"), ("out", "--only")])
def test_how_it_is_called(project: Path, arguments: tuple[str, ...]) -> None:
    done = remake(project, *arguments)
    assert done.returncode == 2 and "benchmarks/shapes.sh FOLDER" in done.stderr
    assert not (project / "python.log").exists()


def _same(command: str, stored: str, project: Path) -> bool:
    """Whether the script's command is the stored one, whose folder is called FOLDER."""
    words, wanted = shlex.split(command), shlex.split(stored.removeprefix("python -m "))
    folder = str(project / "made anew")
    return ["FOLDER" if word.startswith(folder) else word for word in words] == wanted
