"""hfd.sh: what it says, and that it downloads the right files from a hub that is served here."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from wan.checkpoints.published import REPOSITORIES, SPECS

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WAN_FILES = [
    "README.md",
    "Wan2.1_VAE.pth",
    "assets/comp_effic.png",
    "config.json",
    "diffusion_pytorch_model.safetensors",
    "examples/i2v_input.JPG",
    "google/umt5-xxl/spiece.model",
    "google/umt5-xxl/tokenizer.json",
    "models_t5_umt5-xxl-enc-bf16.pth",
]
WAN_WANTED = {
    "Wan2.1_VAE.pth",
    "config.json",
    "diffusion_pytorch_model.safetensors",
    "google/umt5-xxl/spiece.model",
    "google/umt5-xxl/tokenizer.json",
    "models_t5_umt5-xxl-enc-bf16.pth",
}


def body(name: str) -> bytes:
    return f"content of {name}".encode()


def tag(name: str) -> str:
    """The name that git gives the file's content."""
    return hashlib.sha1(b"blob %d\0%s" % (len(body(name)), body(name))).hexdigest()


def hfd(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"PYTHON": sys.executable, "HF_HOME": str(cwd / "hf_home"), "no_proxy": "127.0.0.1"} | environment
    return subprocess.run(
        ["bash", str(ROOT / "hfd.sh"), *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
    )


@contextmanager
def hub(files: list[str], error: tuple[int, str] | None = None) -> Iterator[str]:
    """A hub with one repository of `files`, or one that answers everything with an error; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(send_body=False)

        def do_GET(self) -> None:
            self.answer(send_body=True)

        def answer(self, send_body: bool) -> None:
            status, content, extra = self.content(urlsplit(self.path).path)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT, **extra}.items():
                self.send_header(name, value)
            self.end_headers()
            if send_body:
                self.wfile.write(content)

        def content(self, path: str) -> tuple[int, bytes, dict[str, str]]:
            if error is not None:
                return error[0], b"", {"X-Error-Code": error[1]}
            if path.startswith("/api/"):
                listing: object = {"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
                if "/tree/" in path:
                    listing = [{"type": "file", "path": f, "size": len(body(f)), "oid": tag(f)} for f in files]
                return 200, json.dumps(listing).encode(), {"Content-Type": "application/json"}
            name = path.partition(f"/resolve/{COMMIT}/")[2]
            return 200, body(name), {"ETag": f'"{tag(name)}"'}

        def log_message(self, format: str, *args: object) -> None:
            """Keeps the test's output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def command_in(folder: Path, name: str, body: str) -> str:
    """A PATH on which `name` is a shell script of this body."""
    folder.mkdir()
    script = folder / name
    script.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    script.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def below(folder: Path) -> set[str]:
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in files if path.parts[0] != ".cache"}


def test_no_argument_prints_the_usage(tmp_path: Path) -> None:
    result = hfd(cwd=tmp_path)
    assert result.returncode == 2
    assert "which repository?" in result.stderr
    assert "bash hfd.sh Wan-AI/Wan2.1-T2V-1.3B checkpoints" in result.stderr


def test_help_names_every_repository_that_missing_files_point_to(tmp_path: Path) -> None:
    result = hfd("--help", cwd=tmp_path)
    assert result.returncode == 0
    for repository in REPOSITORIES.values():
        assert f"bash hfd.sh {repository} " in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Wan2.1-T2V-1.3B",), "'Wan2.1-T2V-1.3B' is not of the form OWNER/REPOSITORY"),
        (("--dryrun", "a/b"), "there is no option --dryrun"),
        (("a/b/", "c"), "'a/b/' is not of the form OWNER/REPOSITORY or OWNER/REPOSITORY/FILE"),
        (("a/b", "c", "d"), "too many arguments: d"),
    ],
)
def test_misuse(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = hfd(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("repository", "files"),
    [
        ("gdhe17/Self-Forcing", "checkpoints/self_forcing_dmd.pt"),
        ("Efficient-Large-Model/LongLive-1.3B", "models/*.pt"),
        ("zhuhz22/Causal-Forcing/causal-forcing++/framewise-2step.pt", "causal-forcing++/framewise-2step.pt"),
        ("someone/else", "all"),
    ],
)
def test_dry_run_says_what_would_come_and_leaves_nothing(tmp_path: Path, repository: str, files: str) -> None:
    result = hfd(repository, "weights", "--dry_run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    owner, name = repository.split("/")[:2]
    assert f"repository: {owner}/{name}\nfiles:      {files}\n" in result.stdout
    assert f"folder:     weights/{name}" in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("repository", sorted({spec.repository for spec in SPECS}))
def test_the_files_are_those_that_configurations_name(tmp_path: Path, repository: str) -> None:
    told = hfd(repository, "--dry_run", cwd=tmp_path).stdout
    patterns = next(line for line in told.splitlines() if line.startswith("files:")).split()[1:]
    needed = {file for spec in SPECS if spec.repository == repository for file in spec.files}
    assert needed == {file for file in needed if any(fnmatch(file, pattern) for pattern in patterns)}
    assert all(any(fnmatch(file, pattern) for file in needed) for pattern in patterns)


def test_the_folder_is_the_current_one_by_default(tmp_path: Path) -> None:
    assert "folder:     ./Self-Forcing\n" in hfd("gdhe17/Self-Forcing", "--dry_run", cwd=tmp_path).stdout


def test_downloads_the_needed_files_alone(tmp_path: Path) -> None:
    with hub(WAN_FILES) as endpoint:
        result = hfd("Wan-AI/Wan2.1-T2V-1.3B", "weights", cwd=tmp_path, HF_ENDPOINT=endpoint)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "weights" / "Wan2.1-T2V-1.3B"
    assert below(folder) == WAN_WANTED
    assert (folder / "Wan2.1_VAE.pth").read_text() == "content of Wan2.1_VAE.pth"


def test_downloads_one_file_of_several(tmp_path: Path) -> None:
    with hub(["a/x++.pt", "a/y.pt", "x++.pt"]) as endpoint:
        result = hfd("owner/name/a/x++.pt", cwd=tmp_path, HF_ENDPOINT=endpoint)
    assert result.returncode == 0, result.stderr
    assert below(tmp_path / "name") == {"a/x++.pt"}


def test_downloads_with_the_hf_command_when_python_lacks_the_library(tmp_path: Path) -> None:
    scripts = Path(sys.executable).parent
    if not (scripts / "hf").exists():
        pytest.skip("this huggingface_hub has no hf command")
    python = tmp_path / "no_hub" / "python"
    path = command_in(python.parent, "python", "exit 1")
    with hub(WAN_FILES) as endpoint:
        environment = {"HF_ENDPOINT": endpoint, "PYTHON": str(python), "PATH": f"{scripts}:{path}"}
        result = hfd("Wan-AI/Wan2.1-T2V-1.3B", cwd=tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    assert below(tmp_path / "Wan2.1-T2V-1.3B") == WAN_WANTED


def test_an_unreachable_hub_fails_at_once_and_says_what_to_do(tmp_path: Path) -> None:
    start = time.monotonic()
    result = hfd("gdhe17/Self-Forcing", cwd=tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert time.monotonic() - start < 60
    assert result.returncode == 1
    assert "http://127.0.0.1:9 cannot be reached" in result.stderr
    assert "HF_ENDPOINT=https://... bash hfd.sh gdhe17/Self-Forcing ." in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, "GatedRepo", "the hub refused access to owner/name."),
        (403, "GatedRepo", "the hub refused access to owner/name."),
        (401, "RepoNotFound", "the hub has no repository owner/name, or it is private."),
        (404, "RepoNotFound", "the hub has no repository owner/name, or it is private."),
    ],
)
def test_refusals_of_the_hub(tmp_path: Path, status: int, code: str, message: str) -> None:
    with hub([], (status, code)) as endpoint:
        result = hfd("owner/name", cwd=tmp_path, HF_ENDPOINT=endpoint)
    assert result.returncode == 1
    assert message in result.stderr
    assert "HF_TOKEN=hf_... bash hfd.sh owner/name ." in result.stderr


def test_without_huggingface_hub(tmp_path: Path) -> None:
    path = command_in(tmp_path / "bin", "python_without", "exit 1")
    result = hfd("a/b", cwd=tmp_path, PYTHON="python_without", PATH=path.split(":")[0] + ":/usr/bin:/bin")
    assert result.returncode == 1
    assert "huggingface_hub is not installed for python_without" in result.stderr
    assert "pip install huggingface_hub" in result.stderr


def test_a_disk_that_is_too_small_is_noticed_before_the_download(tmp_path: Path) -> None:
    line = "echo 'Filesystem 1024-blocks Used Available Capacity Mounted'; echo '/dev/small 9000000 1 5000000 1% /'"
    path = command_in(tmp_path / "bin", "df", line)
    result = hfd("Wan-AI/Wan2.1-T2V-1.3B", "weights", cwd=tmp_path, PATH=path, HF_ENDPOINT="http://127.0.0.1:9")
    assert result.returncode == 1
    assert "not enough space in .: about 18 GB are needed, 5 GB are free." in result.stderr
    assert "bash hfd.sh Wan-AI/Wan2.1-T2V-1.3B FOLDER" in result.stderr
    assert not (tmp_path / "weights").exists()
