"""Every command of the README and of docs/ is true: each is run, on small checkpoints in the real ones' layout."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import inference
import interactive_inference
import sample_vbench
from benchmarks import compare as comparison
from benchmarks import tables
from dummy import compare
from pipeline.atlas import command as atlas
from pipeline.calibrate import command as calibrate
from pipeline.config.config import load_config
from pipeline.runtime.inputs import require_bounded
from pipeline.runtime.loading import generator_settings
from shapes import frontier
from studio import client
from studio.__main__ import parse_arguments, settings_from
from studio.house import examples_of
from tests import conformance
from tests.small_checkpoints import write_published, write_small_checkpoints
from utils import recover
from utils.video import VideoWriter, probe
from wan.config import WAN_1_3B

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
TEXT = "\n".join([README, *PAGES.values()])
COMMANDS = dict.fromkeys(
    line.strip()
    for block in re.findall(r"^```bash\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if line.strip()
)
SCRIPTS = {"inference.py": inference.main, "interactive_inference.py": interactive_inference.main}
SMALL = ["resolution=[32,48]", "num_output_frames=12", "inference_iter=1", "dummy_forcing.num_dummy=6"]
UNPLANNED = ["vae_tile=never", "low_memory=false"]  # how a video is decoded is the same for all checkpoints
SMALL_VBENCH = ["inference_iter=2", "num_samples=1", "num_flickering_samples=1"]
SMALL_STORYBOARD = ["num_output_frames=21", "switch_frame_indices=[4,7,10,13,16]"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the README leaves it: configs, prompts, checkpoints, and the files that examples start from."""
    folder = tmp_path_factory.mktemp("clone")
    write_small_checkpoints(folder / "checkpoints", lora_rank=256)
    write_published(folder / "checkpoints", lora_rank=256)
    shutil.copytree(ROOT / "checkpoints" / "shapes", folder / "checkpoints" / "shapes")
    for name in ("configs", "prompts"):
        shutil.copytree(ROOT / name, folder / name)
    frames = np.random.default_rng(0).integers(0, 255, (9, 32, 48, 3), np.uint8)
    for name, count in (("image.png", 1), ("video.mp4", 9)):
        with VideoWriter(folder / f"{name}.mp4", 48, 32) as writer:
            writer.write(frames[:count])
        (folder / f"{name}.mp4").rename(folder / name)
    board = {"prompts": ["A red ball moves to the right.", "It grows."], "switch_frame_indices": [9]}
    (folder / "storyboard.jsonl").write_text(json.dumps(board) + "\n")
    return folder


def small_calibration(path: Path) -> None:
    """As the page makes it, for the small checkpoints and the small video."""
    made = ["--config_path", "configs/self_forcing_inference.yaml", "--videos", "1", "--steps", "3", "--blocks", "2"]
    path.unlink(missing_ok=True)
    assert calibrate.main([*made, "--out", str(path), *SMALL, "dummy_forcing=off"]) == 0


def test_commands_are_found() -> None:
    assert len(COMMANDS) > 15
    assert "make demo" in COMMANDS


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python ") and "inference.py" in c])
def test_a_script_runs(
    command: str, clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(clone)
    shutil.rmtree("videos", ignore_errors=True)
    shutil.rmtree("interactive_videos", ignore_errors=True)
    shutil.rmtree("demo", ignore_errors=True)
    if "calibration.safetensors" in command:
        small_calibration(Path("checkpoints/self_forcing_calibration.safetensors"))
    _, script, *arguments = shlex.split(command)
    small = SMALL + (SMALL_STORYBOARD if script == "interactive_inference.py" else [])
    if command in PAGES["checkpoints.md"]:
        small = [*small, *UNPLANNED]
    longer = "rolling_forcing" in command or "_calibrated.yaml" in command
    if longer:  # as many blocks as it has steps, or as show what heads need
        small = [*small, "num_output_frames=15"]
    assert SCRIPTS[script]([*arguments, *small]) == 0, capsys.readouterr().err
    if "--dry_run" in arguments:
        assert "Memory, as tensors" in capsys.readouterr().out
        return
    folder = "interactive_videos" if script == "interactive_inference.py" else "videos"
    folder = "demo/shapes" if "shapes" in command else folder
    (made,) = Path(folder).glob("*.mp4")
    frames = 81 if script == "interactive_inference.py" else 57 if longer else 45
    assert (probe(made).frames, probe(made).width, probe(made).height) == (frames, 48, 32)


@pytest.mark.parametrize("command", [c for c in COMMANDS if "sample_vbench.py" in c and not c.startswith("torchrun")])
def test_vbench_sampling_runs(
    command: str, clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(clone)
    _, _, *arguments = shlex.split(command)
    status = sample_vbench.main([*arguments, *SMALL, *SMALL_VBENCH])
    if "--check" in arguments:
        assert status == 1  # two videos are not what VBench looks for in all
        assert "2 of 2 videos are there and whole" in capsys.readouterr().out
    else:
        assert status == 0
    assert len(list(Path("videos/self_forcing_vbench").glob("*.mp4"))) == 2


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("torchrun")])
def test_torchrun_is_called_rightly(command: str) -> None:
    """The runs themselves are those of test_sampling.py, test_together.py and test_studio_together.py; here their
    arguments are understood."""
    _, processes, script, *arguments = shlex.split(command)
    assert re.fullmatch(r"--nproc_per_node=\d", processes)
    if script == "sample_vbench.py":
        parsed = sample_vbench.parse_arguments(arguments)
    elif script == "-m":
        assert arguments.pop(0) == "studio"
        parsed = parse_arguments(arguments)
    else:
        assert script == "inference.py"
        parsed = inference.parse_arguments(arguments, None)
    load_config(ROOT / parsed.config_path, parsed.overrides)


@pytest.mark.parametrize("command", [c for c in COMMANDS if "utils.recover" in c])
def test_recovering_runs(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    frames = np.random.default_rng(0).integers(0, 255, (24, 32, 48, 3), np.uint8)
    (tmp_path / "videos").mkdir()
    with contextlib.suppress(KeyboardInterrupt), VideoWriter(Path("videos/NAME.mp4"), 48, 32, stream=True) as writer:
        writer.write(frames)
        raise KeyboardInterrupt
    assert recover.main(shlex.split(command)[3:]) == 0
    assert probe(Path("videos/NAME.recovered.mp4")).frames == 24


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("bash hfd.sh")])
def test_a_download_is_understood(command: str) -> None:
    done = subprocess.run([*shlex.split(command), "--dry_run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    owner, repository, *file = command.split()[2].split("/", 2)
    assert f"{owner}/{repository}" in done.stdout and all(name in done.stdout for name in file)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_a_target_exists(command: str) -> None:
    subprocess.run([*shlex.split(command), "-n"], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("command", [c for c in COMMANDS if "-m pipeline.calibrate" in c])
def test_a_calibration_is_made_and_shown(
    command: str, clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(clone)
    _, _, _, *arguments = shlex.split(command)
    small = [] if "--curve" in arguments else [*SMALL, "dummy_forcing=off", "--videos", "1", "--steps", "3"]
    if "--out" in arguments:
        Path(arguments[arguments.index("--out") + 1]).unlink(missing_ok=True)
    assert calibrate.main([*arguments, *small]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("command", [c for c in COMMANDS if "-m benchmarks.compare" in c])
def test_a_comparison_is_called_rightly(command: str, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run itself is tests/test_policy_comparison.py's; here its policies are understood."""
    monkeypatch.chdir(clone)
    configs, _ = comparison.configured(comparison._arguments(shlex.split(command)[3:]))
    assert list(configs) == ["full", "packed", "online:1.33", "window"]


@pytest.mark.parametrize("command", [c for c in COMMANDS if "-m dummy." in c])
def test_the_atlas_and_the_comparison_run(
    command: str, clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(clone)
    _, _, module, *arguments = shlex.split(command)
    if module == "dummy.compare":
        for name in arguments:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text('{"roles": [[0, 1, 2], [1, 2, 2]]}', encoding="utf-8")
        assert compare.main(arguments) == 0
        return
    small = [] if "--atlas" in arguments else ["inference_iter=1", "num_output_frames=12"]
    assert atlas.main([*arguments, *small]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("command", [c for c in COMMANDS if "-m shapes.frontier" in c])
def test_the_frontier_is_called_rightly(command: str) -> None:
    """The run itself is tests/test_frontier.py's; here its arguments are understood."""
    assert frontier._arguments(shlex.split(command)[3:]).captions > 0


@pytest.mark.parametrize("command", [c for c in COMMANDS if "tests.conformance" in c])
def test_the_runner_is_called_rightly(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert conformance.main(shlex.split(command)[3:]) == 0


@pytest.mark.parametrize("command", [c for c in COMMANDS if "python -m studio" in c])
def test_the_studio_is_called_rightly(command: str, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It and its client run in tests/test_studio_*.py; here their arguments are understood."""
    monkeypatch.chdir(clone)
    _, _, module, *arguments = shlex.split(command)
    if module == "studio.client":
        assert client.parse_arguments(arguments).out == "video.mp4"
        return
    given = parse_arguments(arguments)
    config = load_config(given.config_path, given.overrides)
    assert settings_from(given).is_loopback and examples_of(config)
    require_bounded(generator_settings(config, WAN_1_3B))


def test_no_command_is_left_out() -> None:
    known = ("python inference.py", "python interactive_inference.py", "bash hfd.sh", "make ", "python -m tests.")
    known += (
        "python -m dummy.",
        "python -m pipeline.atlas",
        "python -m pipeline.calibrate",
        "python -m benchmarks.compare",
        "python -m shapes.frontier",
        "python sample_vbench.py",
        "torchrun ",
        "python -m utils.recover",
        "python -m studio",
    )
    others = [command for command in COMMANDS if not command.startswith((*known, "pip install -r requirements.txt"))]
    assert others == []


def test_tables_are_those_of_the_results() -> None:
    assert tables.main(["--check"]) == 0, "run python -m benchmarks.tables"


def test_files_that_the_documents_name_exist() -> None:
    for name in re.findall(r"(?:configs|prompts|tests|pipeline|dummy|benchmarks)/[\w./-]+\.\w+", TEXT):
        assert (ROOT / name).is_file(), name
    for page, text in {"../README.md": README, **PAGES}.items():
        for link in re.findall(r"\]\(([\w./-]+)\)", text):
            assert (ROOT / "docs" / page).parent.joinpath(link).resolve().exists(), f"{page}: {link}"


def test_the_readme_is_short() -> None:
    assert len(README.split()) < 900
    assert sorted(PAGES) == sorted(set(re.findall(r"docs/(\w+\.md)", README)))
