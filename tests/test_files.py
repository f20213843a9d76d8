"""Files are whole or absent; folders are proved writable; leftovers are told from work in progress."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utils import files
from utils.errors import InputError
from utils.files import ensure_writable_folder, partial_path, remove_stale_partials, write_atomic, write_together


def test_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, "old")
    write_atomic(path, "neu: ü\n")
    assert path.read_bytes() == "neu: ü\n".encode()
    assert os.listdir(tmp_path) == ["a.json"]


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\ud800")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_write_into_no_folder_or_over_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.json: cannot be written \(No such file or directory\)"):
        write_atomic(tmp_path / "missing" / "a.json", "x")
    with pytest.raises(InputError, match="is a folder"):
        write_atomic(tmp_path, "x")
    with pytest.raises(InputError, match="File name too long"):
        write_atomic(tmp_path / ("x" * 256), "x")


def test_the_longest_names_are_possible(tmp_path: Path) -> None:
    for name in ("x" * 255, "x" * 254 + "y"):
        write_atomic(tmp_path / name, name)
    assert (tmp_path / ("x" * 255)).read_text() == "x" * 255
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    partial_path(path).symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"a\.json: no space left"):
        write_atomic(path, "x")
    assert os.listdir(tmp_path) == []


def test_files_that_belong_together_are_all_new_or_all_old(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    write_together(dict.fromkeys(paths, "old"))
    paths[1].unlink()
    paths[1].mkdir()
    with pytest.raises(InputError, match="b: is a folder"):
        write_together(dict.fromkeys(paths, "new"))
    assert [path.read_text() for path in (paths[0], paths[2])] == ["old", "old"]
    paths[1].rmdir()
    write_together(dict.fromkeys(paths, "new"))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new", "b": "new", "c": "new"}


@pytest.mark.parametrize("ends_before", range(3))
def test_the_last_file_says_that_they_belong_together(
    ends_before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    write_together(dict.fromkeys(paths, "old"))
    commit = files.commit_partial

    def interrupted(partial: Path, path: Path) -> None:
        if path == paths[ends_before]:
            raise KeyboardInterrupt
        commit(partial, path)

    monkeypatch.setattr(files, "commit_partial", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_together(dict.fromkeys(paths, "new"))
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {name: "new" if place < ends_before else "old" for place, name in enumerate("ab")}


def test_folder_is_created(tmp_path: Path) -> None:
    ensure_writable_folder(tmp_path / "a" / "b", "output_folder")
    assert os.listdir(tmp_path / "a" / "b") == []


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(InputError, match=r"output_folder: .*file is a file, not a folder"):
        ensure_writable_folder(file, "output_folder")
    with pytest.raises(InputError, match=r"output_folder: the folder .* cannot be written \(Not a directory\)"):
        ensure_writable_folder(file / "below", "output_folder")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that even root cannot write to")
def test_folder_that_cannot_be_written() -> None:
    with pytest.raises(InputError, match="output_folder: the folder /proc/self cannot be written"):
        ensure_writable_folder(Path("/proc/self"), "output_folder")


def _partial_of(path: Path, pid: int) -> Path:
    """The partial name that the process `pid` of this machine would use."""
    return path.with_name(partial_path(path).name.replace(f".{os.getpid()}.", f".{pid}."))


def test_stale_partials_go_and_all_else_stays(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    stale = [_partial_of(tmp_path / name, ended.pid) for name in ("a.mp4", "b c.json", "no suffix", ".x\ny.mp4")]
    kept = [
        partial_path(tmp_path / "mine.mp4"),
        _partial_of(tmp_path / "others.mp4", os.getppid()),
        tmp_path / "video.mp4",
        tmp_path / ".hidden",
        tmp_path / f".a.{ended.pid}.partial.mp4",  # not our pattern: no machine in it
    ]
    for path in stale + kept:
        path.write_text("x")
    assert sorted(remove_stale_partials(tmp_path)) == sorted(stale)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_partials_of_another_machine_go_after_a_day(tmp_path: Path) -> None:
    tag = partial_path(Path("x.mp4")).name.split(".")[2]
    other = "000000" if tag != "000000" else "111111"
    new, old = (tmp_path / f".{name}.{other}.1.partial.mp4" for name in ("new", "old"))
    for path in (new, old):
        path.write_text("x")
    os.utime(old, (time.time() - 90_000,) * 2)
    assert remove_stale_partials(tmp_path) == [old]
    assert list(tmp_path.iterdir()) == [new]


def test_tidying_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        remove_stale_partials(tmp_path / "missing")
