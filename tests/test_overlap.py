"""Writing beside generating: the bytes of doing one after the other, and a clean end whatever fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import interactive_inference
import sample_vbench
from pipeline.assembly import Pipeline
from pipeline.config.config import InferenceConfig, load_config
from pipeline.config.jobs import VideoJob, read_jobs
from pipeline.session import Session, SessionBlock
from pipeline.video_files import write_videos
from tests.conftest import PROMPTS, ROOT, Program
from tests.test_interruption import UNPLANNED, processes_that_mention, wait_for
from utils.errors import InputError
from utils.video import VideoWriter, probe

CPU = torch.device("cpu")
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and limits")


def configure(program: Program, *overrides: str) -> InferenceConfig:
    arguments = program.arguments(*overrides)
    program.videos.mkdir(exist_ok=True)
    return load_config(arguments[1], arguments[2:])


def parts(config: InferenceConfig) -> tuple[Pipeline, VideoJob]:
    job = read_jobs(config)[0]
    return Pipeline.from_config(config, prompts=job.prompts, device=CPU), job


def nothing_left(program: Program) -> None:
    assert program.written == []
    assert processes_that_mention(program.videos) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "background"]


def test_same_bytes_with_and_without(program: Program) -> None:
    assert program("inference_iter=2") == 0
    together = program.mp4s
    assert program("inference_iter=2", "overlap=false", "overwrite=true") == 0
    assert program.mp4s == together
    assert len(together) == 2


@pytest.mark.parametrize("overlap", ["auto", "false"])
def test_storyboards_and_vbench_write_the_same_way(program: Program, overlap: str) -> None:
    storyboard = program.file("story.jsonl", json.dumps({"prompts": list(PROMPTS[:2])}) + "\n")
    config = "longlive_interactive_inference"
    given = (
        f"data_path={storyboard}",
        "switch_frame_indices=[3]",
        f"overlap={overlap}",
        "lora_ckpt=null",
        "dummy_forcing.ar_start=1",
    )
    assert interactive_inference.main(program.arguments(*given, config=config)) == 0
    assert [probe(program.videos / name).frames for name in program.mp4s] == [33]
    folder = program.folder / "vbench"
    given = (f"output_folder={folder}", f"overlap={overlap}", "num_samples=2", "samples_per_batch=2")
    arguments = program.arguments("extended_prompt_path=null", "inference_iter=1", *given, config="self_forcing_vbench")
    assert sample_vbench.main(arguments) == 0
    assert sorted(probe(path).frames for path in folder.glob("*.mp4")) == [33, 33]


@posix
@pytest.mark.parametrize("overlap", ["auto", "false"])
def test_a_killed_ffmpeg_ends_the_video(program: Program, overlap: str) -> None:
    config = configure(program, f"overlap={overlap}", "num_output_frames=60", "resolution=[64,96]")
    pipeline, job = parts(config)
    blocks = []

    def on_block(index: int) -> None:
        blocks.append(index)
        if index == 2:
            for process in children():
                os.kill(process, signal.SIGKILL)

    with pytest.raises(InputError, match=r"ffmpeg was killed \(SIGKILL\) before the file was complete"):
        write_videos(pipeline, [job], on_block)
    assert len(blocks) < 12  # of 20: at once, not at the end
    nothing_left(program)


def children() -> list[int]:
    """ffmpeg processes whose parent is this one (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
        except OSError:  # it has ended meanwhile
            continue
        if int(rest.split()[1]) == os.getpid() and "ffmpeg" in name:
            found.append(int(stat.parent.name))
    return found


class Failing:
    """A decoder that fails with its third block."""

    def __init__(self, decoder: object, error: type[BaseException]) -> None:
        self._decoder, self._error, self._calls = decoder, error, 0

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        self._calls += 1
        if self._calls == 3:
            raise self._error
        return self._decoder(latents)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("overlap", "error"), [("auto", KeyError), ("auto", KeyboardInterrupt), ("false", torch.OutOfMemoryError)]
)
def test_a_failing_decoder_ends_the_video(
    program: Program, overlap: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, job = parts(configure(program, f"overlap={overlap}"))
    make = pipeline.vae.decoder

    def decoder(*arguments: int) -> object:
        made = make(*arguments)
        made.decode = Failing(made.decode, error)  # type: ignore[method-assign]
        return made

    monkeypatch.setattr(pipeline.vae, "decoder", decoder)
    with pytest.raises(error):
        write_videos(pipeline, [job], lambda _: None)
    nothing_left(program)
    monkeypatch.undo()
    assert write_videos(pipeline, [job], lambda _: None).frames == 33  # and nothing is broken


@posix
def test_a_full_disk_is_told(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))  # which ffmpeg inherits
    try:
        assert program("num_output_frames=12", "video_crf=0", "inference_iter=1") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert "no space left to write it" in said and "Traceback" not in said
    nothing_left(program)


@pytest.mark.parametrize("overlap", ["auto", "false"])
def test_a_slow_writer_bounds_what_waits_and_progress_says_what_is_done(
    program: Program, overlap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, job = parts(configure(program, "num_output_frames=30", f"overlap={overlap}"))
    taken = 0
    ahead, undone = [], []
    make, write = Session.__next__, VideoWriter.write

    def counted(session: Session) -> SessionBlock:
        block = make(session)
        ahead.append(block.index + 1 - taken)
        return block

    def slowly(writer: VideoWriter, frames: torch.Tensor) -> None:
        nonlocal taken
        threading.Event().wait(0.1)
        write(writer, frames)
        taken += 1

    monkeypatch.setattr(Session, "__next__", counted)
    monkeypatch.setattr(VideoWriter, "write", slowly)
    profile = write_videos(pipeline, [job], lambda index: undone.append(index + 1 - taken))
    assert max(ahead) <= (4 if overlap == "auto" else 1)  # two blocks that wait, one at work, one just done
    assert undone == [0] * 10  # what is told of is with ffmpeg
    assert probe(job.path).frames == profile.frames == 117


def test_the_profile_says_what_overlap_saved(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that sleeps as long as a block takes works beside it, or after it."""
    write = VideoWriter.write

    def slowly(writer: VideoWriter, frames: torch.Tensor) -> None:
        threading.Event().wait(0.1)
        write(writer, frames)

    monkeypatch.setattr(VideoWriter, "write", slowly)
    profiles = {}
    for overlap in ("auto", "false"):
        pipeline, job = parts(configure(program, f"overlap={overlap}", "num_output_frames=18"))
        profiles[overlap] = write_videos(pipeline, [job], lambda _: None)
    assert profiles["auto"].write_ms > 600 and profiles["false"].write_ms > 600
    assert profiles["auto"].overlap_ms > 50 > profiles["false"].overlap_ms
    for profile in profiles.values():
        assert profile.first_frame_ms is not None and 0 < profile.first_frame_ms < profile.total_ms


def test_an_unusable_codec_is_told_before_anything_is_made(
    program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("it may be usable here")
    assert program("video_codec=h264_nvenc") == 2
    assert "error: video_codec: ffmpeg cannot encode with h264_nvenc here" in capsys.readouterr().err
    assert program.mp4s == {}


def test_another_device_for_the_vae_must_be_there(program: Program) -> None:
    if torch.cuda.is_available():
        pytest.skip("it may be there")
    with pytest.raises(InputError, match="vae_device: 'cuda:1' asked for, but PyTorch finds 0 cuda devices"):
        parts(configure(program, "vae_device=cuda:1"))


@posix
def test_an_interruption_in_the_middle_of_a_video(program: Program) -> None:
    arguments = program.arguments("resolution=[64,96]", "num_output_frames=300", "inference_iter=1", *UNPLANNED)
    process = subprocess.Popen(
        [sys.executable, "inference.py", *arguments],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        # Where the tests run in the background of a shell, SIGINT is ignored and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_for(lambda: any(path.stat().st_size > 0 for path in program.unfinished), process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert b"Traceback" not in said
    nothing_left(program)
