"""A streamed video can be watched while it grows, turns into an ordinary file, and survives its writer's death."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from utils import recover as command
from utils.errors import InputError
from utils.files import partial_path, remove_stale_partials
from utils.growing import Fragments, growing_path, recover, recovered_path, whole_fragments
from utils.video import Frames, VideoWriter, probe, read_frames

ROOT = Path(__file__).parent.parent
WIDTH, HEIGHT = 96, 64
BLOCKS = (9, 12, 12, 12)
GOOD = 35  # dB; neighbouring frames of the pattern are below 21
HELD_BACK = 4  # frames: three in x264, one in the muxer
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and limits")


def _moving(frames: int, start: int = 0) -> Frames:
    """A smooth pattern that drifts, so that every frame differs from its neighbours by far more than coding does."""
    t = np.arange(start, start + frames)[:, None, None, None]
    y, x = np.arange(HEIGHT)[None, :, None, None], np.arange(WIDTH)[None, None, :, None]
    waves = np.sin(x / 9 + t / 2 + np.arange(3)) + np.cos(y / 7 - t / 3)
    return (127.5 + 60 * waves).astype(np.uint8)


def _psnr(a: Frames, b: Frames) -> float:
    """The worst frame's, in dB."""
    assert a.shape == b.shape
    errors = ((a.astype(float) - b) ** 2).mean((1, 2, 3))
    return float(10 * np.log10(255**2 / errors.max()))


def _write(path: Path, blocks: tuple[int, ...] = BLOCKS, stream: bool = True, codec: str = "libx264") -> None:
    with VideoWriter(path, WIDTH, HEIGHT, codec=codec, stream=stream) as writer:
        for block in blocks:
            writer.write(_moving(block, writer.frames_written))


def _write_all(path: Path, pieces: list[Frames]) -> None:
    with VideoWriter(path, WIDTH, HEIGHT, stream=True) as writer:
        for piece in pieces:
            writer.write(piece)


def _frames_within(path: Path, expected: int, seconds: float = 20) -> int:
    """The whole fragments of a growing file, as soon as there are `expected` or the time is up."""
    end = time.monotonic() + seconds
    while (count := whole_fragments(path).count) < expected and time.monotonic() < end:
        time.sleep(0.02)
    return count


def _write_and_raise(path: Path, frames: int, error: type[BaseException]) -> None:
    with VideoWriter(path, WIDTH, HEIGHT, stream=True) as writer:
        writer.write(_moving(frames))
        raise error


def _make_fragments(path: Path, frames: int) -> Path:
    """A growing file of `frames` as an interruption leaves it."""
    with pytest.raises(KeyError):
        _write_and_raise(path, frames, KeyError)
    return growing_path(path)


def test_the_growing_file_plays_after_every_block(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    growing = tmp_path / "a.growing.mp4"
    with VideoWriter(path, WIDTH, HEIGHT, stream=True) as writer:
        for block in BLOCKS:
            writer.write(_moving(block, writer.frames_written))
            expected = writer.frames_written - HELD_BACK
            assert _frames_within(growing, expected) == expected
            assert probe(growing).frames == expected  # a player's view, while ffmpeg has the file open
            assert _psnr(read_frames(growing), _moving(expected)) > GOOD
            assert os.listdir(tmp_path) == ["a.growing.mp4"]
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_the_end_is_the_ordinary_video(tmp_path: Path) -> None:
    _write(tmp_path / "streamed.mp4")
    _write(tmp_path / "plain.mp4", stream=False)
    assert sorted(os.listdir(tmp_path)) == ["plain.mp4", "streamed.mp4"]
    streamed, plain = tmp_path / "streamed.mp4", tmp_path / "plain.mp4"
    assert probe(streamed) == probe(plain)
    assert probe(streamed).frames == sum(BLOCKS)
    source, frames = _moving(sum(BLOCKS)), read_frames(streamed)
    assert _psnr(frames, read_frames(plain)) > 35
    assert _psnr(frames, source) > _psnr(read_frames(plain), source) - 1
    data = streamed.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    assert b"moof" not in data
    assert b"nclx" + bytes([0, 1, 0, 1, 0, 1]) in data
    assert len(data) < 1.4 * plain.stat().st_size


def test_same_frames_same_bytes_without_versions(tmp_path: Path) -> None:
    _write(tmp_path / "a.mp4", (9, 12))
    _write(tmp_path / "b.mp4", (1, 13, 7))
    data = (tmp_path / "a.mp4").read_bytes()
    assert data == (tmp_path / "b.mp4").read_bytes()
    assert b"x264 - core" not in data
    assert b"Lavf" not in data
    first, second = (recover(_make_fragments(tmp_path / name, 21)) for name in ("c.mp4", "d.mp4"))
    assert first.read_bytes() == second.read_bytes()
    assert np.array_equal(read_frames(first), read_frames(tmp_path / "a.mp4"))


@pytest.mark.parametrize("name", ["a:b.mp4", "-a.mp4", "%d 100%.mp4", "🐱.mp4", "a.growing.mp4", "x" * 190 + ".mp4"])
def test_any_file_name(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _write(Path(name), (2,))
    assert os.listdir() == [name]
    recovered = recover(_make_fragments(Path(f"{name[:-4]}2.mp4"), 2))
    assert probe(recovered).frames == 2


@posix
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_video_is_kept_to_the_last_frame(
    tmp_path: Path, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.mp4"
    with pytest.raises(error):
        _write_and_raise(path, 20, error)
    assert os.listdir(tmp_path) == ["a.growing.mp4"]
    assert f"{growing_path(path)}: 20 frames are kept; python -m utils.recover" in caplog.text
    assert remove_stale_partials(tmp_path) == []
    recovered = recover(growing_path(path))
    assert recovered == tmp_path / "a.recovered.mp4"
    assert probe(recovered).frames == 20
    assert sorted(os.listdir(tmp_path)) == ["a.growing.mp4", "a.recovered.mp4"]


def test_nothing_is_kept_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no frame was written"):
        _write(tmp_path / "a.mp4", ())
    with pytest.raises(InputError, match=r"a\.mp4: ffmpeg ended with status \d+ before the file was .*nonsense"):
        _write(tmp_path / "a.mp4", (9,), codec="nonsense")
    assert os.listdir(tmp_path) == []


def test_the_growing_file_of_an_earlier_run_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.mp4"
    _make_fragments(path, 30)
    caplog.set_level(logging.INFO)
    _make_fragments(path, 5)
    assert "left by an earlier run, replaced" in caplog.text
    assert whole_fragments(growing_path(path)).count == 5
    _write(path, (9,))
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_a_finished_video_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_text("old")
    _make_fragments(path, 5)
    assert path.read_text() == "old"
    _write(path, (9,))
    assert probe(path).frames == 9


def test_folder_that_cannot_take_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.mp4: cannot be written"):
        _write(tmp_path / "missing" / "a.mp4")
    with pytest.raises(InputError, match="is a folder"):
        _write(tmp_path)


WRITE_BLOCKS = """
import sys
from pathlib import Path
from tests.test_streamed_files import HEIGHT, WIDTH, _moving
from utils.video import VideoWriter
with VideoWriter(Path(sys.argv[1]), WIDTH, HEIGHT, stream=True) as writer:
    while True:
        writer.write(_moving(12, writer.frames_written))
        print(writer.frames_written, flush=True)
        sys.stdin.readline()
"""


def _start_writing(path: Path, blocks: int) -> subprocess.Popen[str]:
    """Another process, in a group of its own, that has written `blocks` of 12 frames and waits."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE_BLOCKS, str(path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    for block in range(1, blocks + 1):
        assert process.stdout.readline() == f"{12 * block}\n"
        if block < blocks:
            process.stdin.write("\n")
            process.stdin.flush()
    return process


def _child(pid: int) -> int:
    """The one process whose parent is `pid` (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
        except OSError:
            continue  # it ended while we looked
    (child,) = found
    return child


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_run_loses_less_than_a_block(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with _start_writing(path, blocks=3) as process:
        ffmpeg = _child(process.pid)
        _frames_within(growing_path(path), 36 - HELD_BACK)
        os.kill(ffmpeg, signal.SIGKILL)  # as when the machine goes down: nobody is left to finish the file
        process.kill()
    assert os.listdir(tmp_path) == ["a.growing.mp4"]
    recovered = recover(growing_path(path))
    frames = read_frames(recovered)
    assert len(frames) == 36 - HELD_BACK >= 36 - 12
    assert _psnr(frames, _moving(len(frames))) > GOOD


@posix
def test_a_killed_process_alone_loses_nothing(tmp_path: Path) -> None:
    """ffmpeg then sees the end of its input, and puts down what it holds."""
    path = tmp_path / "a.mp4"
    with _start_writing(path, blocks=2) as process:
        process.kill()
    assert _frames_within(growing_path(path), 24) == 24
    assert probe(recover(growing_path(path))).frames == 24


def test_every_cut_gives_the_whole_frames_before_it(tmp_path: Path) -> None:
    growing = _make_fragments(tmp_path / "a.mp4", 10)
    data, whole = growing.read_bytes(), read_frames(growing)
    cut = tmp_path / "cut.growing.mp4"
    ends = set()
    for length in range(0, len(data) + 1, 7):
        cut.write_bytes(data[:length])
        ends.add(whole_fragments(cut))
    assert [fragments.count for fragments in sorted(ends, key=lambda f: f.end)] == list(range(11))
    for fragments in ends - {Fragments(0, 0)}:
        cut.write_bytes(data[: fragments.end + 5])
        assert np.array_equal(read_frames(recover(cut)), whole[: fragments.count])
        cut.write_bytes(data[: fragments.end] + bytes(100))  # a hole where a crashed file system lost the data
        assert whole_fragments(cut) == fragments


def test_nothing_to_recover(tmp_path: Path) -> None:
    path = tmp_path / "a.growing.mp4"
    with pytest.raises(InputError, match=r"a\.growing\.mp4: no such file"):
        recover(path)
    _write(tmp_path / "plain.mp4", (2,), stream=False)
    for data in (b"", b"text that is no video", (tmp_path / "plain.mp4").read_bytes()):
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"holds no whole fragment.*stream_output: true"):
            recover(path)
    assert sorted(os.listdir(tmp_path)) == ["a.growing.mp4", "plain.mp4"]


def test_fragments_that_hold_no_video(tmp_path: Path) -> None:
    path = tmp_path / "a.growing.mp4"
    path.write_bytes(bytes([0, 0, 0, 8]) + b"moof" + bytes([0, 0, 0, 8]) + b"mdat")
    assert whole_fragments(path) == Fragments(1, 16)
    with pytest.raises(InputError, match="ffmpeg ended"):
        recover(path)
    assert os.listdir(tmp_path) == ["a.growing.mp4"]


def test_the_pattern_tells_frames_apart() -> None:
    assert _psnr(_moving(1), _moving(1, 1)) < 21


def test_names() -> None:
    assert growing_path(Path("v/a.b.mp4")) == Path("v/a.b.growing.mp4")
    assert recovered_path(Path("v/a.b.growing.mp4")) == Path("v/a.b.recovered.mp4")
    assert recovered_path(Path("v/renamed.mp4")) == Path("v/renamed.recovered.mp4")


def test_growing_files_are_no_leftovers(tmp_path: Path) -> None:
    growing = growing_path(tmp_path / "a.mp4")
    growing.write_bytes(b"x")
    os.utime(growing, (0, 0))
    assert remove_stale_partials(tmp_path) == []
    assert not partial_path(growing).exists()
    assert growing.exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    growing = _make_fragments(tmp_path / "a.mp4", 9)
    assert command.main([str(growing)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.recovered.mp4'}: 9 frames\n"
    assert command.main([str(tmp_path / "none.growing.mp4"), str(growing)]) == 2
    output = capsys.readouterr()
    assert output.err == f"{tmp_path / 'none.growing.mp4'}: no such file. Give a file that ends in .growing.mp4.\n"
    assert output.out.endswith("9 frames\n")


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a file system")
def test_full_disk_keeps_what_there_was_room_for(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting needs root")
    noise = np.random.default_rng(0).integers(0, 256, (12, HEIGHT, WIDTH, 3), dtype=np.uint8)
    try:
        with pytest.raises(InputError, match=r"a\.mp4: no space left to write it\. Free some"):
            _write_all(tmp_path / "a.mp4", [noise] * 20)
        assert os.listdir(tmp_path) == ["a.growing.mp4"]
        assert whole_fragments(tmp_path / "a.growing.mp4").count >= 1
        with pytest.raises(InputError, match=r"a\.recovered\.mp4: no space left"):
            recover(tmp_path / "a.growing.mp4")
        assert os.listdir(tmp_path) == ["a.growing.mp4"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
