"""From a job to a finished file: generate, decode and write block by block, so that memory stays flat.

Parts are given, not built here: the generator and the VAE. What a video costs is measured while it is made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from pipeline.config import InferenceConfig, as_dict
from pipeline.generator import BlockGenerator, Rollout, Segment
from pipeline.given import load_given
from pipeline.jobs import VideoJob
from utils.contact_sheet import write_contact_sheet
from utils.files import write_atomic
from utils.profiler import Profiler, VideoProfile, device_name
from utils.seed import NoiseStream
from utils.video import VideoWriter, to_uint8
from wan.geometry import LatentGeometry
from wan.text import pad
from wan.vae import VAE

OnBlock = Callable[[int], None]


class VideoPipeline:
    """Makes videos with one generator and one VAE, under one configuration."""

    def __init__(self, generator: BlockGenerator, vae: VAE, config: InferenceConfig, tile: int | None = None) -> None:
        """`tile`: decode in tiles of at most that many pixels a side, None for whole frames."""
        self.generator = generator
        self.vae = vae
        self.config = config
        self.tile = tile
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
        start_from: Path | None = None,
    ) -> Rollout:
        """Begin one video per seed, all with the prompts `embeds` (each [length, text_dim]) from frames `starts` on.

        With `start_from` (an image or a video) its frames are the first of every video.
        """
        model = self.generator.model
        with profiler.span("init"), torch.inference_mode():
            padded = [pad([embed] * len(seeds), model.config.text_len) for embed in embeds]
            segments = [Segment(s, model.encode_text(e)) for s, e in zip(starts, padded, strict=True)]
            given = None
            if start_from is not None:
                given = (
                    load_given(start_from, self.config, self.vae).to(model.device).expand(len(seeds), -1, -1, -1, -1)
                )
            return self.generator.start(self.geometry, segments, NoiseStream(seeds), len(seeds), profiler, given)

    def frames(self, rollout: Rollout, profiler: Profiler) -> Iterator[Tensor]:
        """Decode every block as it comes: uint8 [B, frames, H, W, 3] on the CPU, cropped to the configured size."""
        height, width = self.config.pixel_size
        decoder = self.vae.decoder(tile=self.tile)
        for block in rollout.blocks():
            with profiler.span("decode"):
                video = decoder.decode(block.latents)[..., :height, :width]
                frames = torch.stack([to_uint8(one) for one in video]).cpu()
            profiler.mark("first frame")
            yield frames

    def write(self, jobs: Sequence[VideoJob], embeds: Mapping[str, Tensor], on_block: OnBlock) -> VideoProfile:
        """Make the files of `jobs`, which differ in their noise alone, as one batch, and the JSON beside each.

        `on_block` hears of every finished block. With more than one job, observed head roles are common to all.
        """
        profiler = Profiler(self.generator.model.device)
        prompts, starts = jobs[0].prompts, jobs[0].starts
        assert all((job.prompts, job.starts, job.start_from) == (prompts, starts, jobs[0].start_from) for job in jobs)
        seeds = [job.noise_seed for job in jobs]
        rollout = self.start(starts, [embeds[prompt] for prompt in prompts], seeds, profiler, jobs[0].start_from)
        counts = []
        with ExitStack() as files:
            writers = [files.enter_context(self._writer(job)) for job in jobs]
            for index, batch in enumerate(self.frames(rollout, profiler)):
                with profiler.span("write"):
                    for writer, frames in zip(writers, batch, strict=True):
                        writer.write(frames)
                counts.append(batch.shape[1])
                on_block(index)
        profile = self._profile(profiler, rollout, counts)
        if self.config.contact_sheet:
            for job in jobs:
                write_contact_sheet(job.path, profile.frames)
        if self.config.save_metadata:
            for job in jobs:
                write_atomic(job.metadata_path, json.dumps(self._metadata(job, rollout, profile), indent=1) + "\n")
        return profile

    def _writer(self, job: VideoJob) -> VideoWriter:
        height, width = self.config.pixel_size
        config = self.config
        return VideoWriter(job.path, width, height, config.fps, config.video_crf, stream=config.stream_output)

    def _profile(self, profiler: Profiler, rollout: Rollout, counts: Sequence[int]) -> VideoProfile:
        report = profiler.report()
        spans = {name: report.spans.get(name, []) for name in ("init", "denoise", "clean", "decode", "write")}
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
