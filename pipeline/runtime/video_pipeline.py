"""From a job to a finished file: generate, decode and write block by block, so that memory stays flat.

With `overlap` a block is decoded and copied beside the denoising of the next one where the device can do that, and
written by a thread of its own. The order of things, and so the result, is the same without. Parts are given, not built
here: the generator and the decoder. What a video costs is measured while it is made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pipeline.config.config import InferenceConfig, as_dict
from pipeline.config.jobs import VideoJob
from pipeline.runtime.decoding import BlockDecoder, DecodeStrategy, HostFrames, fastest_strategy
from pipeline.runtime.generator import BlockGenerator, Rollout
from pipeline.runtime.inputs import Segment
from pipeline.runtime.prefix import load_prefix
from utils.background import Background
from utils.contact_sheet import write_contact_sheet
from utils.files import atomic_write, write_partial
from utils.profiler import Profiler, VideoProfile, device_name
from utils.seed import NoiseStream
from utils.video import VideoWriter
from wan.geometry import LatentGeometry
from wan.text import pad
from wan.vae.streaming import LatentDecoder
from wan.vae.vae import VAE

OnBlock = Callable[[int], None]

QUEUED = 2  # blocks that may wait to be written


class FrameWriter(Protocol):
    """What takes finished frames; `VideoWriter` is one."""

    def write(self, frames: Tensor) -> None:
        """The next frames, uint8 [frames, H, W, 3] on the host."""

    def kill(self) -> None:
        """Let a `write` that is at work in another thread fail."""


class VideoPipeline:
    """Makes videos with one generator and one decoder, under one configuration."""

    def __init__(
        self,
        generator: BlockGenerator,
        vae: LatentDecoder,
        config: InferenceConfig,
        strategy: DecodeStrategy | None = None,
        encoder: VAE | None = None,
    ) -> None:
        """`vae` decodes, in this `way`, None for the fastest. `encoder` is needed for videos that start from files."""
        self.generator = generator
        self.vae = vae
        self.encoder = encoder
        self.config = config
        self.overlap = config.overlap is not False
        self.strategy = strategy or fastest_strategy(vae.device, config.num_frame_per_block, self.overlap)
        height, width = config.latent_size
        self.geometry = LatentGeometry(
            height, width, config.num_output_frames, config.num_frame_per_block, generator.model.config.in_dim
        )

    def start(
        self,
        starts: Sequence[int],
        embeds: Sequence[Tensor],
        seeds: Sequence[int],
        profiler: Profiler,
        prefix_latents: Tensor | None = None,
    ) -> Rollout:
        """Begin one video per seed, all with the prompts `embeds` (each [length, text_dim]) from frames `starts` on.

        `prefix_latents` latents, see `prefix_latents`, are the first of every video.
        """
        model = self.generator.model
        with profiler.span("init"), torch.inference_mode():
            padded = [pad([embed] * len(seeds), model.config.text_len) for embed in embeds]
            segments = [Segment(s, model.encode_text(e)) for s, e in zip(starts, padded, strict=True)]
            if prefix_latents is not None:
                prefix_latents = prefix_latents.to(model.device).expand(len(seeds), -1, -1, -1, -1)
            return self.generator.start(
                self.geometry, segments, NoiseStream(seeds), len(seeds), profiler, prefix_latents
            )

    def prefix_latents(self, path: Path | None, profiler: Profiler) -> Tensor | None:
        """Latents [1, F, C, h, w] of the image or video to go on from."""
        if path is None:
            return None
        assert self.encoder is not None, "a video that starts from a file needs an encoder"
        with profiler.span("init", self.encoder.device), torch.inference_mode():
            return load_prefix(path, self.config, self.encoder)

    def decoded(self, rollout: Rollout, profiler: Profiler) -> Generator[HostFrames, None, None]:
        """Every block as it comes: uint8 [B, frames, H, W, 3] on its way to the host, cropped to the configured size.

        With overlap on a CUDA device, what is yielded may not be there yet; the device is at work on it.
        """
        decoder = BlockDecoder(self.vae, self.config.pixel_size, profiler, self.strategy)
        with closing(decoder), closing(rollout.blocks()) as blocks:
            for block in blocks:
                yield decoder.decode(block.latents)

    def write(self, jobs: Sequence[VideoJob], embeds: Mapping[str, Tensor], on_block: OnBlock) -> VideoProfile:
        """Make the files of `jobs`, which differ in their noise alone, as one batch, and the JSON beside each.

        `on_block` hears of every finished block. With more than one job, observed head roles are common to all.
        """
        profiler = Profiler(self.generator.model.device)
        prompts, starts = jobs[0].prompts, jobs[0].starts
        assert all((job.prompts, job.starts, job.start_from) == (prompts, starts, jobs[0].start_from) for job in jobs)
        seeds = [job.noise_seed for job in jobs]
        prefix_latents = self.prefix_latents(jobs[0].start_from, profiler)
        rollout = self.start(starts, [embeds[prompt] for prompt in prompts], seeds, profiler, prefix_latents)
        with ExitStack() as files:
            writers = [files.enter_context(self._writer(job)) for job in jobs]
            counts = self.deliver(rollout, writers, profiler, on_block)
            with profiler.host_span("write"):
                for writer in writers:
                    writer.finish()
            prefix_blocks = 0 if prefix_latents is None else prefix_latents.shape[1] // self.config.num_frame_per_block
            profile = self.profile(profiler, rollout, counts, prefix_blocks)
            if self.config.save_metadata:
                # Contexts end in reverse: a video gets its name when its metadata has got its own.
                for job in jobs:
                    text = json.dumps(self._metadata(job, rollout, profile), indent=1) + "\n"
                    write_partial(files.enter_context(atomic_write(job.metadata_path)), job.metadata_path, text)
                for job in jobs:
                    job.path.unlink(missing_ok=True)  # made again: the old one never stands beside the new metadata
        if self.config.contact_sheet:
            for job in jobs:
                write_contact_sheet(job.path, profile.frames)
        return profile

    def deliver(
        self, rollout: Rollout, writers: Sequence[FrameWriter], profiler: Profiler, on_block: OnBlock
    ) -> list[int]:
        """Make every block of a batch and hand it to the batch's writers; returns how many frames each block had."""

        def write(block: HostFrames) -> None:
            batch = block.wait()
            profiler.mark("first frame")
            with profiler.host_span("write"):
                for writer, frames in zip(writers, batch, strict=True):
                    writer.write(frames)

        def stop() -> None:
            for writer in writers:
                writer.kill()

        counts = []
        with ExitStack() as stack:
            hand_over = stack.enter_context(Background(write, QUEUED, stop)).put if self.overlap else write
            blocks = stack.enter_context(closing(self.decoded(rollout, profiler)))
            for index, block in enumerate(blocks):
                hand_over(block)
                counts.append(block.frames.shape[1])
                on_block(index)
        return counts

    def _writer(self, job: VideoJob) -> VideoWriter:
        height, width = self.config.pixel_size
        config = self.config
        return VideoWriter(
            job.path,
            width,
            height,
            config.fps,
            config.video_crf,
            codec=config.video_codec,
            stream=config.stream_output,
        )

    def profile(self, profiler: Profiler, rollout: Rollout, counts: Sequence[int], prefix_blocks: int) -> VideoProfile:
        """The numbers of a video that is done, of whose blocks `counts` has the frames; waits for the device."""
        report = profiler.report()
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
            device_name=device_name(self.generator.model.device),
            peak_bytes=profiler.peak_memory_bytes(),
            forwards=rollout.forwards,
            skipped=rollout.skipped,
            copy_ms=sum(spans["copy"]),
            prefix_blocks=prefix_blocks,
        )

    def _metadata(self, job: VideoJob, rollout: Rollout, profile: VideoProfile) -> dict[str, object]:
        return {
            "prompts": list(job.prompts),
            "starts": list(job.starts),
            "seed": self.config.seed,
            "prompt_index": job.prompt_index,
            "sample_index": job.sample_index,
            "noise_seed": job.noise_seed,
            "head_roles": rollout.roles.to_json() if rollout.roles is not None else None,
            "timings": profile.as_dict(),
            "torch": torch.__version__,
            "config": as_dict(self.config),
        }
