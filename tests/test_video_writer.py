"""A video file is whole or absent, whatever happens to the writer, ffmpeg, the disk or the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.contact_sheet import write_contact_sheet
from utils.errors import InputError
from utils.ffmpeg import check_codec
from utils.files import partial_path
from utils.video import Frames, VideoInfo, VideoWriter, probe, read_frames, remove_stale_partials, to_uint8
from utils.video_probe import NotAWholeVideo

ROOT = Path(__file__).parent.parent
WIDTH, HEIGHT = 64, 48
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and limits")


def _noise(frames: int, seed: int = 0) -> Frames:
    return np.random.default_rng(seed).integers(0, 256, (frames, HEIGHT, WIDTH, 3), dtype=np.uint8)


def _write(path: Path, *pieces: Frames | torch.Tensor, preset: str = "veryfast", codec: str = "libx264") -> None:
    with VideoWriter(path, WIDTH, HEIGHT, preset=preset, codec=codec) as writer:
        for piece in pieces:
            writer.write(piece)


def _write_and_raise(path: Path, error: type[BaseException], meanwhile: Callable[[], object] = lambda: None) -> None:
    before = _children()
    with VideoWriter(path, WIDTH, HEIGHT) as writer:
        writer.write(_noise(30))
        assert partial_path(path).exists()
        assert len(_children() - before) == 1
        meanwhile()
        raise error


def _write_and_kill_ffmpeg(path: Path) -> None:
    before = _children()
    with VideoWriter(path, WIDTH, HEIGHT) as writer:
        writer.write(_noise(1))
        os.kill((_children() - before).pop(), signal.SIGKILL)
        for _ in range(40):
            writer.write(_noise(10))


def _run(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _children() -> set[int]:
    """Processes, zombies too, whose parent is this one (Linux)."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended while we looked
        if int(fields[1]) == os.getpid():
            found.add(int(stat.parent.name))
    return found


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    frames = np.zeros((14, HEIGHT, WIDTH, 3), np.uint8)
    frames[:7], frames[7:] = (200, 40, 30), (20, 60, 220)
    path = tmp_path / "a.mp4"
    with VideoWriter(path, WIDTH, HEIGHT) as writer:
        writer.write(frames[:9])
        writer.write(torch.from_numpy(frames[9:]))
        writer.write(frames[:0])
        assert not path.exists()
        assert writer.frames_written == 14
    assert probe(path) == VideoInfo(WIDTH, HEIGHT, frames=14, fps=16.0, codec="h264", pix_fmt="yuv420p")
    read = read_frames(path)
    assert read.shape == frames.shape
    # Colours survive: the matrix that is written is the one that is declared.
    assert np.abs(read.astype(int) - frames).max() <= 4
    assert b"nclx" + bytes([0, 1, 0, 1, 0, 1]) in path.read_bytes()  # primaries, transfer, matrix: BT.709
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_same_frames_same_bytes_without_versions(tmp_path: Path) -> None:
    _write(tmp_path / "a.mp4", _noise(20))
    _write(tmp_path / "b.mp4", _noise(20)[:3], np.asfortranarray(_noise(20)[3:]))
    data = (tmp_path / "a.mp4").read_bytes()
    assert data == (tmp_path / "b.mp4").read_bytes()
    assert b"x264 - core" not in data
    assert b"Lavf" not in data
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize(
    "name", ["a:b.mp4", "-a.mp4", "%d 100%.mp4", "🐱.mp4", "http:x.mp4", "a\nb.mp4", "x" * 190 + ".mp4"]
)
def test_any_file_name(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _write(Path(name), _noise(1))
    assert os.listdir() == [name]
    assert probe(Path(name)).frames == 1


def test_an_existing_file_is_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_text("old")
    with pytest.raises(KeyError):
        _write_and_raise(path, KeyError)
    assert path.read_text() == "old"
    _write(path, _noise(2))
    assert probe(path).frames == 2


@pytest.mark.parametrize(("width", "height"), [(63, 48), (64, 47), (0, 48)])
def test_odd_sides(width: int, height: int) -> None:
    with pytest.raises(InputError, match=rf"resolution: .*{width} x {height} pixels.*Use (64|2) x 48"):
        VideoWriter(Path("a.mp4"), width, height)


@pytest.mark.parametrize(
    "frames",
    [np.zeros((1, 48, 64, 3), np.float32), np.zeros((48, 64, 3), np.uint8), np.zeros((1, 64, 48, 3), np.uint8)],
)
def test_wrong_frames(tmp_path: Path, frames: Frames) -> None:
    with pytest.raises(ValueError, match="frames must be uint8"):
        _write(tmp_path / "a.mp4", frames)
    assert os.listdir(tmp_path) == []


def test_no_frames_and_not_open(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no frame was written"):
        _write(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="is not open"):
        VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT).write(_noise(1))
    assert os.listdir(tmp_path) == []


def test_folder_that_cannot_take_the_file(tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "a.mp4", Path("/proc/a.mp4")):
        with pytest.raises(InputError, match=r"a\.mp4: cannot be written"):
            _write(path, _noise(1))
    with pytest.raises(InputError, match="is a folder"):
        _write(tmp_path, _noise(1))


@posix
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, SystemExit])
def test_exception_cleans_up(tmp_path: Path, error: type[BaseException]) -> None:
    before = _children()
    with pytest.raises(error):
        _write_and_raise(tmp_path / "a.mp4", error)
    assert os.listdir(tmp_path) == []
    assert _children() == before


def test_an_interruption_while_an_error_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two processes that make a video one is lost: the other one's error is followed by its launcher's SIGTERM."""
    waits = iter([KeyboardInterrupt, None])
    wait = subprocess.Popen.wait

    def interrupted(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        error = next(waits, None)
        if error is not None:
            raise error
        return wait(process, timeout)

    with pytest.raises(KeyboardInterrupt):
        _write_and_raise(
            tmp_path / "x.mp4", ConnectionError, lambda: monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pieces", [1, 40])
def test_failing_ffmpeg(tmp_path: Path, pieces: int) -> None:
    """With one small piece ffmpeg's end shows at the close only, with many the pipe breaks."""
    with pytest.raises(InputError, match=r"a\.mp4: ffmpeg ended with status \d+ before the file was .*nonsense"):
        _write(tmp_path / "a.mp4", *[_noise(10)] * pieces, codec="nonsense")
    assert os.listdir(tmp_path) == []


@posix
def test_killed_ffmpeg(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.mp4: ffmpeg was killed \(SIGKILL\) before .* Run again.* memory"):
        _write_and_kill_ffmpeg(tmp_path / "a.mp4")
    assert os.listdir(tmp_path) == []


def test_long_complaints_are_cut(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ffmpeg ended") as caught:
        _write(tmp_path / "a.mp4", *[_noise(10)] * 40, preset="x\n" * 2500)
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


FAULTY = {"not there": "none", "no program": "text", "a folder": "folder"}


@posix
@pytest.mark.parametrize("name", FAULTY.values(), ids=FAULTY)
def test_ffmpeg_that_does_not_start(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "whole.mp4", _noise(1))
    tools = tmp_path / "tools"
    (tools / "folder").mkdir(parents=True)
    (tools / "text").write_text("no program")
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tools / name))
    for stream in (False, True):
        with (
            pytest.raises(InputError, match=f"ffmpeg: {tools / name} cannot be started .*IMAGEIO_FFMPEG_EXE"),
            VideoWriter(tmp_path / "a.mp4", WIDTH, HEIGHT, stream=stream),
        ):
            pass
    for use in (probe, read_frames, lambda path: write_contact_sheet(path, 1), lambda _: check_codec("libx264")):
        with pytest.raises(InputError, match="cannot be started") as caught:
            use(tmp_path / "whole.mp4")
        assert not isinstance(caught.value, NotAWholeVideo)  # the video is not to blame
    assert sorted(os.listdir(tmp_path)) == ["tools", "whole.mp4"]


@posix
@pytest.mark.parametrize(
    ("ends", "message"),
    [("kill -KILL $$", r"ffmpeg was killed \(SIGKILL\)"), ("kill -SEGV $$", r"ffmpeg crashed \(SIGSEGV\)")],
)
def test_ffmpeg_that_ends_at_once(tmp_path: Path, ends: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "whole.mp4", _noise(1))
    script = tmp_path / "ffmpeg"
    script.write_text(f"#!/bin/sh\n{ends}\n")
    script.chmod(0o700)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(script))
    for use in (
        lambda path: _write(path, _noise(1)),
        lambda path: _write(path, *[_noise(10)] * 10),
        lambda path: write_contact_sheet(path, 1),
        probe,
        read_frames,
    ):
        with pytest.raises(InputError, match=rf"whole\.mp4: {message}|whole\.png: {message}"):
            use(tmp_path / "whole.mp4")
    assert sorted(os.listdir(tmp_path)) == ["ffmpeg", "whole.mp4"]


@posix
def test_a_folder_that_is_locked_meanwhile(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What the user hears of is the first error, not that the unfinished file cannot be removed."""
    folder = tmp_path / "videos"
    folder.mkdir()
    with pytest.raises(KeyError), as_somebody_else(folder):
        _write_and_raise(folder / "a.mp4", KeyError, meanwhile=lambda: folder.chmod(0o500))
    assert "cannot be deleted (Permission denied)" in caplog.text
    with as_somebody_else(folder):
        folder.chmod(0o500)
        with pytest.raises(InputError, match=r"b\.mp4: cannot be written \(Permission denied\)"):
            _write(folder / "b.mp4", _noise(1))
        with pytest.raises(InputError, match=r"b\.png: cannot be written \(Permission denied\)"):
            write_contact_sheet(folder / "b.mp4", 1)


@contextmanager
def as_somebody_else(folder: Path) -> Iterator[None]:
    """Within the context this process is not root, and `folder` is its own."""
    if os.geteuid() != 0:
        yield
        return
    above = [path for path in folder.parents if path.stat().st_uid == 0 and not path.stat().st_mode & 0o001]
    modes = [path.stat().st_mode for path in above]
    nobody = 65534
    os.chown(folder, nobody, nobody)
    for path in above:
        path.chmod(0o711)
    os.seteuid(nobody)
    try:
        yield
    finally:
        os.seteuid(0)
        for path, mode in zip(above, modes, strict=True):
            path.chmod(mode)


WRITE_WITH_LIMIT = """
import resource, sys
from pathlib import Path
import numpy as np
from utils.errors import InputError
from utils.video import VideoWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
frames = np.random.default_rng(0).integers(0, 256, (20, 48, 64, 3), dtype=np.uint8)
try:
    with VideoWriter(Path(sys.argv[1]), 64, 48) as writer:
        for _ in range(10):
            writer.write(frames)
except InputError as error:
    print("InputError", error)
"""


@posix
@pytest.mark.parametrize("limit", [1000, 200_000])
def test_no_room_for_the_file(tmp_path: Path, limit: int) -> None:
    process = _run(WRITE_WITH_LIMIT, tmp_path / "a.mp4", limit)
    output, errors = process.communicate(timeout=60)
    assert output.startswith(f"InputError {tmp_path / 'a.mp4'}: no space left"), errors
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a file system")
def test_full_disk(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting needs root")
    try:
        with pytest.raises(InputError, match=r"a\.mp4: no space left to write it\. Free some"):
            _write(tmp_path / "a.mp4", *[_noise(20)] * 10)
        assert os.listdir(tmp_path) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


WRITE_FOREVER = """
import signal, sys
from pathlib import Path
import numpy as np
from utils.video import VideoWriter
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background of a shell ignore it
frames = np.zeros((5, 48, 64, 3), np.uint8)
with VideoWriter(Path(sys.argv[1]), 64, 48) as writer:
    while True:
        writer.write(frames)
        print("wrote", flush=True)
"""


def _start_writing(path: Path) -> subprocess.Popen[str]:
    process = _run(WRITE_FOREVER, path)
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline() == "wrote\n"
    return process


@posix
def test_killed_process_leaves_no_file(tmp_path: Path) -> None:
    with _start_writing(tmp_path / "a.mp4") as process:
        process.kill()
    left = list(tmp_path.iterdir())
    assert [path.name.startswith(".a.") for path in left] == [True]
    assert remove_stale_partials(tmp_path) == left
    time.sleep(0.5)  # an ffmpeg without its parent sees the end of its input and finishes what is now no file
    assert os.listdir(tmp_path) == []


@posix
def test_interrupted_process_cleans_up(tmp_path: Path) -> None:
    with _start_writing(tmp_path / "a.mp4") as process:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    assert os.listdir(tmp_path) == []


def test_broken_files_are_told(tmp_path: Path) -> None:
    whole = tmp_path / "a.mp4"
    _write(whole, _noise(20))
    data = whole.read_bytes()
    cut = tmp_path / "cut.mp4"
    for length in (0, 10, len(data) // 3, len(data) // 2, len(data) - 1):
        cut.write_bytes(data[:length])
        for read in (probe, read_frames):
            with pytest.raises(InputError, match=r"cut\.mp4: is not a whole video"):
                read(cut)
    with pytest.raises(InputError, match=r"none\.mp4: cannot be read \(No such file"):
        probe(tmp_path / "none.mp4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_to_uint8(dtype: torch.dtype) -> None:
    values = torch.tensor([-1.0, 1.0, 0.0, -3.0, 3.0, -0.99609375], dtype=dtype)
    video = values.repeat(4).view(2, 3, 2, 2)
    before = video.clone()
    frames = to_uint8(video)
    assert frames.dtype == torch.uint8
    assert frames.shape == (2, 2, 2, 3)
    assert frames.is_contiguous()
    expected = torch.tensor([0, 255, 128, 0, 255, 0], dtype=torch.uint8).repeat(4).view(2, 3, 2, 2)
    assert torch.equal(frames, expected.permute(0, 2, 3, 1))
    assert torch.equal(video, before)


def test_every_level_survives_the_conversion() -> None:
    levels = torch.arange(256)
    video = (levels / 127.5 - 1).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_uint8(video)[0, :, :, 1].flatten(), levels.to(torch.uint8))
