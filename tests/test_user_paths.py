"""Names that users give: what is wrong with each is said with the setting, the name and the reason."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pipeline.atlas import command as atlas
from pipeline.config.config import InferenceConfig, load_config
from pipeline.config.jobs import read_jobs
from pipeline.runtime.engine import use_compile_cache
from pipeline.runtime.loading import generator_settings, require_files
from pipeline.vbench.prompts import read_vbench_jobs
from tests.conftest import ROOT
from tests.other_user import as_nobody, open_folder
from tests.small_checkpoints import SmallCheckpoints
from utils.errors import InputError
from utils.files import ensure_writable_folder
from utils.user_paths import is_file, read_bytes, read_json, read_text, require_file, user_path
from wan.config import WAN_1_3B

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX names, pipes and permissions")
CONFIG = str(ROOT / "configs" / "self_forcing_inference.yaml")
READ = ("data_path", "extended_prompt_path", "generator_ckpt", "lora_ckpt", "start_from", "dummy_forcing.roles")
WRITTEN = ("output_folder", "compile_cache")
OF_MODELS = ("model_root", "model_name")


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    return str(caught.value)


def prepare(overrides: Sequence[str]) -> InferenceConfig:
    """What a run does with its paths before it loads anything."""
    config = load_config(CONFIG, overrides)
    read_jobs(config)
    require_files(config)
    ensure_writable_folder(Path(config.output_folder), "output_folder")
    use_compile_cache(None if config.compile_cache is None else Path(config.compile_cache))
    return config


@pytest.fixture
def overrides(checkpoints: SmallCheckpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a run that `prepare` finds nothing wrong with."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    (tmp_path / "prompts.txt").write_text("A red fox runs.\n")
    return [
        f"model_root={checkpoints.root}",
        f"data_path={tmp_path / 'prompts.txt'}",
        f"output_folder={tmp_path / 'v'}",
    ]


def test_nothing_is_wrong(overrides: list[str]) -> None:
    prepare(overrides)


def special_file(folder: Path, kind: str) -> str:
    """A name of which no file can be read, and none written."""
    path = folder / kind
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(kind)
    elif kind == "below a file":
        (folder / "file").write_text("x")
        path = folder / "file" / "x"
    return {"long": "A red fox runs. " * 300, "long name": "x" * 300, "device": "/dev/zero"}.get(kind, str(path))


@pytest.mark.parametrize("kind", ["pipe", "loop", "below a file", "long", "long name", "device"])
@pytest.mark.parametrize("setting", [*READ, *WRITTEN, "model_root"])
def test_names_of_what_can_neither_be_read_nor_written(
    overrides: list[str], tmp_path: Path, setting: str, kind: str
) -> None:
    name = special_file(tmp_path, kind)
    message = message_of(lambda: prepare([*overrides, f"{setting}={name}"]))
    if (setting, kind) == ("model_root", "below a file"):  # which is nowhere, so that every file is missing
        setting = "model_name"
    assert message.startswith(f"{setting}: ") and name.strip()[:90] in message
    assert len(message.splitlines()[0]) < 700


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("~nobody_there/x", "there is no user 'nobody_there'"),
        ('"a\\0b"', "holds a NUL character"),
        ('"a\\nb"', "holds a line break"),
        ('"  "', "the path is empty"),
    ],
)
@pytest.mark.parametrize("setting", ["data_path", "generator_ckpt", "start_from", *WRITTEN, *OF_MODELS, "decoder"])
def test_names_that_are_no_paths(setting: str, name: str, reason: str) -> None:
    given = name.replace('"', '"taehv:', 1) if name[0] == '"' else f"taehv:{name}"
    message = message_of(lambda: load_config(CONFIG, [f"{setting}={given if setting == 'decoder' else name}"]))
    assert message.startswith(f"{setting}: ") and reason in message


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("setting", READ)
def test_a_file_that_is_there_and_cannot_be_read(overrides: list[str], setting: str) -> None:
    message = message_of(lambda: prepare([*overrides, f"{setting}=/proc/self/mem"]))
    assert message.startswith(f"{setting}: /proc/self/mem: ") and "cannot be read (Input/output error)" in message


@pytest.mark.parametrize("setting", ["data_path", "extended_prompt_path", "start_from", "dummy_forcing.roles"])
def test_a_folder_where_a_file_is_due(overrides: list[str], tmp_path: Path, setting: str) -> None:
    config = load_config(CONFIG, [*overrides, f"{setting}={tmp_path}"])
    message = message_of(lambda: [read_jobs(config), generator_settings(config, WAN_1_3B)])
    assert message.startswith(f"{setting}: {tmp_path}") and "is a folder" in message


@pytest.mark.parametrize("setting", [*READ, *WRITTEN, *OF_MODELS])
def test_what_belongs_to_somebody_else(checkpoints: SmallCheckpoints, setting: str) -> None:
    with open_folder() as folder:
        closed = folder / "closed"
        closed.mkdir()
        (folder / "prompts.txt").write_text("A red fox runs.\n")
        (folder / "v").mkdir(mode=0o777)
        (folder / "v").chmod(0o777)
        given = [f"model_root={folder / 'no'}", f"data_path={folder / 'prompts.txt'}", f"output_folder={folder / 'v'}"]
        closed.chmod(0o000)
        names = (closed, closed / "x") if setting in WRITTEN else (closed / "x",)
        for name in names:
            said = as_nobody(lambda name=name: use(setting, name, given))
            assert said.startswith(f"utils.errors.InputError: {setting}: ") and str(closed) in said, said
            assert "(Permission denied)" in said


def use(setting: str, name: Path, overrides: Sequence[str]) -> None:
    """What a run does with a name that stands in this setting."""
    if setting == "output_folder":
        ensure_writable_folder(name, setting)
    elif setting == "compile_cache":
        use_compile_cache(name)
    else:
        prepare([*overrides, f"{setting}={name}"])


def test_a_closed_file_and_a_closed_folder() -> None:
    with open_folder() as folder:
        (folder / "closed").write_text("x")
        (folder / "closed").chmod(0o000)
        said = as_nobody(lambda: read_text(folder / "closed", "--a", "file of prompts"))
        assert f"--a: {folder / 'closed'}: the file of prompts cannot be read (Permission denied)" in said
        assert "a: the" not in as_nobody(lambda: read_text(folder / "closed", "", "file"))
        said = as_nobody(lambda: load_config(str(folder / "closed")))
        assert f"config_path: {folder / 'closed'}: the configuration file cannot be read (Permission denied)" in said


@pytest.mark.parametrize("option", ["--out", "--report", "--roles", "--plot", "--sampling", "--atlas", "--prompts"])
def test_the_paths_of_the_head_atlas(
    option: str, overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    source = (
        []
        if option == "--atlas"
        else ["--config_path", CONFIG, *overrides, "num_output_frames=12", "dummy_forcing.num_dummy=6"]
    )
    for name in ("~nobody_there/x", str(tmp_path / "file" / "x"), str(tmp_path / ("x" * 300)), "a\0b"):
        assert atlas.main([option, name, *source]) == 2
        said = capsys.readouterr().err
        expected = "data_path" if option == "--prompts" and name[0] == "/" else option
        assert f"error: {expected}: " in said and "Traceback" not in said


def test_home_folders_are_expanded_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    names = [*READ, *WRITTEN, *OF_MODELS]
    config = load_config(CONFIG, [f"{name}=~/{name}" for name in names] + ["decoder=taehv:~/decoder"])
    for name in names:
        section = config.dummy_forcing if "." in name else config
        assert getattr(section, name.rpartition(".")[2]) == f"{tmp_path}/{name}"
    assert config.preview_path == tmp_path / "decoder"
    monkeypatch.setenv("DUMMY_FORCING_ROOT", "~/weights")
    assert load_config(CONFIG).generator_path.is_relative_to(tmp_path / "weights")
    (tmp_path / "c.yaml").write_text("seed: 7\n")
    assert load_config("~/c.yaml").seed == 7
    (tmp_path / "list.json").write_text('["~/a.png"]')
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "p.txt").write_text("A red fox runs.\n")
    (job,) = read_jobs(load_config(CONFIG, ["start_from=~/list.json", "data_path=~/p.txt"]))
    assert job.start_from == tmp_path / "a.png"


def test_where_relative_paths_start_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("A red fox runs.\n")
    start = f"elative paths start from {tmp_path}"
    assert start in message_of(lambda: load_config("configs/a.yaml"))
    for setting in ("data_path", "start_from"):
        config = load_config(CONFIG, ["data_path=p.txt", f"{setting}=no/a"])
        assert start in message_of(lambda config=config: read_jobs(config))
    assert start in message_of(lambda: require_files(load_config(CONFIG)))
    assert start in message_of(lambda: read_vbench_jobs(load_config(CONFIG, ["data_path=no/a"])))


def test_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    require_file(path, "--a")
    assert read_json(path, "--a", "file") == {"a": 1}
    assert is_file(path) and not is_file(tmp_path) and not is_file(tmp_path / "no")
    assert user_path("~", "--a") == Path.home()
    path.write_text("[" * 100_000)
    assert "--a: " in message_of(lambda: read_json(path, "--a", "file"))


def test_a_file_without_end_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert "holds more than 256 MiB" in message_of(lambda: read_bytes(path, "data_path", "file of prompts"))
