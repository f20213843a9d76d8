"""From jobs to finished files: sessions whose blocks are written as they come, so that memory stays flat.

With `overlap` a block is decoded and copied beside the denoising of the next one where the device can do that, and
written by a thread of its own. The order of things, and so the result, is the same without. What a video costs is
measured while it is made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Protocol

import torch
from torch import Tensor

from pipeline.assembly import Pipeline
from pipeline.config.config import InferenceConfig, as_dict
from pipeline.config.jobs import VideoJob
from pipeline.runtime.finished import remove_with_companions
from pipeline.session import Session, SessionBlock
from utils.background import Background
from utils.contact_sheet import draw_contact_sheet, sheet_path
from utils.files import atomic_write, write_partial
from utils.profiler import Profiler, VideoProfile, device_name
from utils.video import VideoWriter

OnBlock = Callable[[int], None]

QUEUED = 2  # blocks that may wait to be written


class FrameWriter(Protocol):
    """What takes finished frames; `VideoWriter` is one."""

    def write(self, frames: Tensor) -> None:
        """The next frames, uint8 [frames, H, W, 3] on the host."""

    def kill(self) -> None:
        """Let a `write` that is at work in another thread fail."""


def _session(pipeline: Pipeline, jobs: Sequence[VideoJob]) -> Session:
    return pipeline.session(
        frames=pipeline.config.num_output_frames,
        noise_seeds=[job.noise_seed for job in jobs],
        start_from=jobs[0].start_from,
        live=False,
        keep_buffers=True,
    )


def write_videos(pipeline: Pipeline, jobs: Sequence[VideoJob], on_block: OnBlock) -> VideoProfile:
    """Make the files of `jobs`, which differ in their noise alone, as one batch, with what stands beside each.

    `on_block` as in `deliver`. With more than one job, observed head roles are common to all. A video gets its name
    last, so that one under its name has its JSON and contact sheet, whenever the process was killed.
    """
    config, first = pipeline.config, jobs[0]
    shared = (first.prompts, first.starts, first.start_from, first.cuts)
    assert all((job.prompts, job.starts, job.start_from, job.cuts) == shared for job in jobs)
    with _session(pipeline, jobs) as session, ExitStack() as files:
        session.plan(list(zip(first.starts, first.prompts, strict=True)), first.cuts)
        writers = [files.enter_context(_writer(config, job)) for job in jobs]
        counts = deliver(session, writers, session.profiler, on_block, overlap=config.overlap is not False)
        with session.profiler.host_span("write"):
            for writer in writers:
                writer.finish()
        profile = profile_of(session, counts)
        # Contexts end in reverse: what stands beside a video gets its name before the video does.
        for job, writer in zip(jobs, writers, strict=True):
            if config.save_metadata:
                text = json.dumps(_metadata(config, job, session, profile), indent=1) + "\n"
                write_partial(files.enter_context(atomic_write(job.metadata_path)), job.metadata_path, text)
            if config.contact_sheet:
                sheet = sheet_path(job.path)
                partial = files.enter_context(atomic_write(sheet))
                draw_contact_sheet(writer.finished_file, profile.frames, partial, sheet)
        for job in jobs:
            remove_with_companions(job)  # made again: the old one never stands beside what belongs to the new one
    return profile


def deliver(
    blocks: Iterable[SessionBlock],
    writers: Sequence[FrameWriter],
    profiler: Profiler,
    on_block: OnBlock,
    overlap: bool,
) -> list[int]:
    """Hand every block of a batch to the batch's writers; returns how many frames each block had.

    `on_block` hears of every block once the writers have its frames; with `overlap`, from the thread that writes.
    """

    def write(block: SessionBlock) -> None:
        batch = block.videos
        profiler.mark("first frame")
        with profiler.host_span("write"):
            for writer, frames in zip(writers, batch, strict=True):
                writer.write(frames)
        counts.append(batch.shape[1])
        on_block(block.index)

    def stop() -> None:
        for writer in writers:
            writer.kill()

    counts: list[int] = []
    with ExitStack() as stack:
        hand_over = stack.enter_context(Background(write, QUEUED, stop)).put if overlap else write
        for block in blocks:
            hand_over(block)
    return counts


def _writer(config: InferenceConfig, job: VideoJob) -> VideoWriter:
    height, width = config.pixel_size
    return VideoWriter(
        job.path,
        width,
        height,
        config.fps,
        config.video_crf,
        codec=config.video_codec,
        stream=config.stream_output,
    )


def profile_of(session: Session, counts: Sequence[int]) -> VideoProfile:
    """The numbers of a video that is done, of whose blocks `counts` has the frames; waits for the device."""
    report, rollout = session.profiler.report(), session.rollout
    spans = {name: report.spans.get(name, []) for name in ("init", "denoise", "clean", "decode", "copy", "write")}
    clean = [*spans["clean"], 0.0]  # the last block has no clean pass
    return VideoProfile(
        init_ms=sum(spans["init"]),
        block_ms=tuple(a + b for a, b in zip(spans["denoise"], clean, strict=True)),
        vae_ms=sum(spans["decode"]),
        write_ms=sum(spans["write"]),
        total_ms=report.total_ms,
        first_frame_ms=report.marks.get("first frame"),
        frames=sum(counts),
        block_frames=tuple(counts),
        device_name=device_name(session.device),
        peak_bytes=session.profiler.peak_memory_bytes(),
        reserved_bytes=session.profiler.reserved_memory_bytes(),
        forwards=rollout.forwards,
        skipped=rollout.skipped,
        copy_ms=sum(spans["copy"]),
        prefix_blocks=session.prefix_blocks,
    )


def _metadata(config: InferenceConfig, job: VideoJob, session: Session, profile: VideoProfile) -> dict[str, object]:
    return {
        "prompts": list(job.prompts),
        "starts": list(job.starts),
        "scene_cuts": list(job.cuts),
        "seed": config.seed,
        "prompt_index": job.prompt_index,
        "sample_index": job.sample_index,
        "noise_seed": job.noise_seed,
        "head_roles": session.roles.to_json() if session.roles is not None else None,
        "timings": profile.as_dict(),
        "torch": torch.__version__,
        "config": as_dict(config),
    }
