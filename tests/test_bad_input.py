"""Input that cannot be used: one message that names the thing and the remedy, status 2, and nothing left behind.

Weights are found wrong before the text encoder is read: where it matters, the text encoder's file is broken too, and
the message must not be about that one.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from pipeline.planning import together
from tests.conftest import Program
from tests.small_checkpoints import SmallCheckpoints, lora_weights

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits and folders")
Fails = Callable[..., str]


@pytest.fixture
def fails(program: Program, capsys: pytest.CaptureFixture[str]) -> Fails:
    """Run with overrides; returns the message, after what goes for all errors has been checked."""

    def run(*overrides: str, **options: str) -> str:
        before = {path: path.read_bytes() for path in program.written} if program.videos.is_dir() else {}
        assert program(*overrides, **options) == 2
        said = capsys.readouterr().err
        assert said.count("error: ") == 1
        assert "Traceback" not in said
        if program.videos.is_dir():
            assert {path: path.read_bytes() for path in program.written} == before
        return said[said.index("error: ") :]

    return run


def without_text_encoder(program: Program) -> Path:
    """A copy of the checkpoints in which the text encoder's file is no checkpoint."""
    root = program.folder / "checkpoints"
    shutil.copytree(program.model_root, root)
    (root / "Wan2.1-T2V-1.3B" / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(b"not a checkpoint")
    return root


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["num_output_frames=10"], ["num_output_frames: 10", "num_frame_per_block 3", "9 or 12"]),
        (["resolution=[30,48]"], ["resolution: [30, 48]", "16", "32 is near"]),
        (["resolution=500"], ["resolution: 500", "480, 720, 1080"]),
        (["dummy_forcing.num_dummy=13"], ["dummy_forcing.num_dummy: 13", "3 layers x 4 heads = 12"]),
        (["dummy_forcing.ar_start=0"], ["dummy_forcing.ar_start", "1 or more, got 0"]),
        (["dummy_forcing.ar_start=2"], ["dummy_forcing.ar_start", "num_output_frames=12 or more"]),
        (["dummy_forcing.policy=pack"], ["dummy_forcing.policy", "did you mean packed"]),
        (["dummy_forcing.denoise_start=1"], ["dummy_forcing.denoise_start: only 0 works"]),
        (["num_ouput_frames=9"], ["num_ouput_frames: unknown key", "did you mean num_output_frames"]),
        (["sink_size=3"], ["sink_size: unknown key", "did you mean model_kwargs.sink_size"]),
        (["seed=one"], ["seed: expected an integer", "'one'"]),
        (["num_samples=0"], ["num_samples: must be 1 or more", "got 0"]),
        (["use_ema='yes'"], ["use_ema: expected true or false"]),
        (["inference_iter=0"], ["inference_iter", "-1 (all prompts)"]),
        (["seed"], ["override 'seed'", "expected key=value"]),
        (["device=tpu"], ["device: expected", "'tpu'"]),
        (["attention=fa3"], ["attention: 'fa3' needs an NVIDIA GPU", "'auto'"]),
        (["data_path=no/such.txt"], ["no/such.txt", "no such file of prompts"]),
        (["extended_prompt_path=no/such.txt"], ["no/such.txt"]),
        (
            ["dummy_forcing.roles=no/such.json"],
            ["no/such.json does not exist", "dummy_forcing.roles", "remove the key"],
        ),
    ],
    ids=lambda value: value[0] if len(value) == 1 else "",
)
def test_settings(program: Program, fails: Fails, overrides: list[str], expected: list[str]) -> None:
    message = fails(f"model_root={without_text_encoder(program)}", *overrides)
    assert all(part in message for part in expected), message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "xpu"])
def test_a_device_that_is_not_there(fails: Fails, device: str) -> None:
    message = fails(f"device={device}")
    assert f"device: '{device}'" in message and "0 " in message and "device=cpu" in message


def test_prompt_files(program: Program, fails: Fails, caplog: pytest.LogCaptureFixture) -> None:
    assert "prompts.txt: holds no prompts" in fails(f"data_path={program.file('prompts.txt', '')}", prompts="")
    latin = program.file("latin.txt", "Ein Fuchs läuft.".encode("latin-1"))
    message = fails(f"data_path={latin}")
    assert f"{latin}: is not UTF-8" in message and "line 1" in message
    assert "is a folder" in fails(f"data_path={program.folder}")
    two = program.file("two.txt", "One.\nTwo.\n")
    for overrides in ([f"extended_prompt_path={two}"], [f"extended_prompt_path={two}", "inference_iter=1"]):
        message = fails(*overrides)
        assert "extended_prompt_path" in message and "2 prompts for the 3" in message
    blank = program.file("blank.txt", "One.\n\n\nTwo.\n")
    assert program("--dry_run", f"data_path={blank}") == 0
    assert "skipped 2 blank lines" in caplog.text


@pytest.mark.parametrize(
    ("line", "switches", "expected"),
    [
        ("{prompts: []}", "3", ["line 2", "is not JSON"]),
        ('{"prompts": ["a", "b", "c"]}', "3", ["storyboard 2", "3 prompts for 1 switches [3]"]),
        ('{"prompts": ["a", "b"], "switch_frame_indices": [7]}', "3", ["storyboard 2", "7", "use 6 or less"]),
        ('{"prompts": ["a", "b"], "switch_frames": [3]}', "3", ["line 2", "did you mean switch_frame_indices"]),
        ('{"prompts": ["a", "b"]}', "6,3", ["switch_frame_indices", "strictly increasing", "[6, 3]"]),
        ('{"prompts": ["a", "b"]}', "9", ["switch_frame_indices", "9", "use 6 or less"]),
    ],
)
def test_storyboards(program: Program, fails: Fails, line: str, switches: str, expected: list[str]) -> None:
    boards = program.file("boards.jsonl", f'{{"prompts": ["x", "y"]}}\n{line}\n')
    message = fails(f"data_path={boards}", f"switch_frame_indices='{switches}'")
    assert all(part.lower() in message.lower() for part in expected), message


def test_missing_checkpoints_are_all_named(program: Program, fails: Fails) -> None:
    root = program.folder / "empty"
    message = fails(f"model_root={root}")
    for name, repository in (
        ("Wan2.1-T2V-1.3B/config.json", "Wan-AI/Wan2.1-T2V-1.3B"),
        ("Wan2.1-T2V-1.3B/Wan2.1_VAE.pth", "Wan-AI/Wan2.1-T2V-1.3B"),
        ("Wan2.1-T2V-1.3B/models_t5_umt5-xxl-enc-bf16.pth", "Wan-AI/Wan2.1-T2V-1.3B"),
        ("Wan2.1-T2V-1.3B/google/umt5-xxl/tokenizer.json", "Wan-AI/Wan2.1-T2V-1.3B"),
        ("Self-Forcing/checkpoints/self_forcing_dmd.pt", "gdhe17/Self-Forcing"),
    ):
        assert f"{root / name} does not exist." in message
        assert f"bash hfd.sh {repository} {root}" in message
    assert "Relative paths start" not in message


def test_where_relative_paths_start_is_said(program: Program, fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(program.folder)
    message = fails("model_root=checkpoints")
    assert "checkpoints/Wan2.1-T2V-1.3B/config.json does not exist." in message
    assert message.endswith(f"\nRelative paths start from {program.folder}.\n")


def damaged(good: bytes, kind: str) -> tuple[bytes, str]:
    """A file that is wrong in a known way, and words that its message must have."""
    return {
        "empty": (b"", "is empty"),
        "truncated": (good[: len(good) // 2], "truncated or damaged"),
        "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
        "web page": (b"<!DOCTYPE html><html>Sign in</html>", "web page"),
    }[kind]


@pytest.mark.parametrize("kind", ["empty", "truncated", "LFS pointer", "web page"])
@pytest.mark.parametrize("part", ["self_forcing", "vae", "text_encoder"])
def test_damaged_checkpoints(
    program: Program, fails: Fails, checkpoints: SmallCheckpoints, part: str, kind: str
) -> None:
    root = without_text_encoder(program)
    path = root / getattr(checkpoints, part).relative_to(checkpoints.root)
    content, words = damaged(getattr(checkpoints, part).read_bytes(), kind)
    path.write_bytes(content)
    message = fails(f"model_root={root}")
    assert message.startswith(f"error: {path} ")
    assert words in message and "bash hfd.sh " in message and str(root) in message


class NeedsCode:
    """Something that weights_only refuses."""


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda state: {**state, "model.head.head.bias": torch.zeros(5)},
            ["1 of another shape: head.head.bias", "[5]"],
        ),
        (lambda state: {k: v for k, v in state.items() if "head.head" not in k}, ["2 missing: head.head.weight"]),
        (lambda state: {**state, "model.extra": torch.zeros(1)}, ["1 unexpected: extra"]),
        (lambda state: {**state, "model.extra": NeedsCode()}, ["pickle that needs code", "NeedsCode"]),
    ],
    ids=["shape", "missing", "unexpected", "code"],
)
def test_generators_that_do_not_fit(
    program: Program,
    fails: Fails,
    checkpoints: SmallCheckpoints,
    change: Callable[[dict[str, object]], dict[str, object]],
    expected: list[str],
) -> None:
    state = torch.load(checkpoints.self_forcing, weights_only=True)["generator_ema"]
    path = program.folder / "generator.pt"
    torch.save({"generator_ema": change(state)}, path)
    message = fails(f"model_root={without_text_encoder(program)}", f"generator_ckpt={path}")
    assert f"error: {path} " in message and all(part in message for part in expected), message


@pytest.mark.parametrize(
    ("factors", "rank", "expected"),
    [
        ({}, 4, ["touches no layer"]),
        (lora_weights({"blocks.7.ffn.0.weight": [128, 64]}, 4, torch.Generator()), 4, ["blocks.7.ffn.0", "lacks"]),
        (lora_weights({"blocks.0.ffn.0.weight": [128, 64]}, 8, torch.Generator()), 4, ["adapter.rank is 4", "rank 8"]),
        (lora_weights({"blocks.0.ffn.0.weight": [128, 60]}, 4, torch.Generator()), 4, ["blocks.0.ffn.0", "[4, 60]"]),
    ],
    ids=["nothing", "unknown layer", "rank", "shape"],
)
def test_loras_that_do_not_fit(
    program: Program, fails: Fails, factors: dict[str, torch.Tensor], rank: int, expected: list[str]
) -> None:
    path = program.folder / "lora.pt"
    torch.save({"generator_lora": factors}, path)
    overrides = [f"lora_ckpt={path}", f"adapter.rank={rank}", "adapter.alpha=4", "num_output_frames=12"]
    message = fails(f"model_root={without_text_encoder(program)}", *overrides, config="longlive_inference")
    assert str(path) in message and all(part in message for part in expected), message


def test_longlives_settings_with_a_lora_of_another_rank(program: Program, fails: Fails) -> None:
    frames, config = "num_output_frames=12", "longlive_inference"
    assert "adapter.rank is 256" in fails(frames, config=config)
    assert "B·A times 64" in fails(frames, "adapter.rank=null", config=config)
    assert "B·A times 64" in fails(frames, "adapter.rank=4", config=config)
    assert program("--dry_run", frames, "adapter=null", config=config) == 0


def test_a_dry_run_looks_into_the_text_encoder(
    program: Program, checkpoints: SmallCheckpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(checkpoints.text_encoder, weights_only=True)
    name = next(reversed(state))
    path = program.folder / "whole numbers.bin"
    torch.save({**state, name: state[name].to(torch.int8)}, path)
    assert program("--dry_run", f"text_encoder_ckpt={path}") == 2
    assert f"error: {path}: tensor '{name}' holds int8 numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("no roles", "is not a JSON file"),
        (json.dumps({"roles": [[0] * 12] * 30}), "30 layers of 12 heads, the model has 3 of 4"),
        (json.dumps({"roles": [[7] * 4] * 3}), "7 is no code"),
        (json.dumps([1, 2]), 'has no "roles"'),
    ],
)
def test_roles_files(program: Program, fails: Fails, content: str, expected: str) -> None:
    path = program.file("roles.json", content)
    message = fails(f"model_root={without_text_encoder(program)}", f"dummy_forcing.roles={path}")
    assert f"dummy_forcing.roles: {path}" in message and expected in message


def test_output_folders(program: Program, fails: Fails) -> None:
    file = program.file("file", "kept")
    for folder, words in ((file, "is a file, not a folder"), (file / "below", "cannot be written")):
        message = fails(f"output_folder={folder}")
        assert "output_folder: " in message and str(folder) in message and words in message
    assert file.read_text() == "kept"
    if os.geteuid() != 0:  # root may write anywhere
        program.videos.mkdir(mode=0o500)
        assert "output_folder" in fails()


@contextmanager
def limited(kind: int, size: int) -> Iterator[None]:
    """Lower a limit of this process for a while; ffmpeg inherits it."""
    old = resource.getrlimit(kind)
    resource.setrlimit(kind, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, old)


def test_a_full_disk(program: Program, fails: Fails) -> None:
    with limited(resource.RLIMIT_FSIZE, 8192):  # bytes a file; the video takes more
        message = fails("inference_iter=1", "resolution=[96,160]")
    assert str(program.videos / "000-a-red-fox-runs-0.mp4") in message and "no space left" in message
    assert program.written == []
    assert program("inference_iter=1") == 0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of this process is read from /proc")
def test_out_of_memory(program: Program, fails: Fails) -> None:
    assert program("inference_iter=1", "num_output_frames=3", "dummy_forcing=off") == 0  # all libraries are loaded now
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    large = ("resolution=[4096,4096]", "num_output_frames=15", "overwrite=true", "inference_iter=1", "vae_tile=never")
    with limited(resource.RLIMIT_AS, used + (400 << 20)):
        message = fails(*large, "dummy_forcing=off", "model_kwargs.local_attn_size=-1")
    assert "device: cpu ran out of memory" in message and "This run takes about " in message and " GiB of " in message
    assert "precision=bf16 model_kwargs.local_attn_size=12 model_kwargs.sink_size=3 resolution=480 (" in message


def test_a_dry_run_tells_when_memory_cannot_suffice(
    program: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program("--dry_run") == 0 and "Warning" not in capsys.readouterr().out
    monkeypatch.setattr(together, "memory_of", lambda device: 64 << 20)
    assert program("--dry_run", "resolution=480", "vae_tile=never", "dummy_forcing=off") == 0
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Warning: ")]
    assert "cpu has not the memory for it. This run takes about " in warning and "cpu has 64.0 MiB" in warning
