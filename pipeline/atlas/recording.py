"""Recording a head atlas: videos made by the product's own loop, under one retention for all heads, and watched.

Nothing is decoded. Scores are made in pieces, and what is kept of a pass is one number a layer, head and frame; what
that takes is in pipeline/atlas/cost.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dummy.atlas.recorder import PassRecorder
from dummy.atlas.table import CLEAN, Atlas
from dummy.config import DummyForcingConfig
from dummy.passes import PassCount
from dummy.policies.registry import has_roles, policy_from_config
from dummy.policy import ContextPolicy
from pipeline.config.config import InferenceConfig, geometry_of
from pipeline.config.jobs import VideoJob, check_count, read_jobs
from pipeline.runtime.generator import BlockGenerator
from pipeline.runtime.inputs import GeneratorSettings
from pipeline.runtime.loading import (
    check_before_loading,
    choose_dtype,
    load_transformer,
)
from pipeline.runtime.prompts import PromptEncoder
from pipeline.session import Session
from utils.errors import InputError
from utils.file_names import output_stems
from utils.seed import NoiseStream, video_seed
from wan.attention.head_group import Observer
from wan.geometry import LatentGeometry

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChosenPasses:
    """Which blocks to record, and which of their passes: (place in the block, name)."""

    blocks: tuple[int, ...]
    passes: tuple[tuple[int, str], ...]
    per_block: int
    in_first: int  # of the first block, which may have denoising steps of its own

    def count(self) -> PassCount:
        """For a new video."""
        return PassCount(self.per_block, self.in_first)

    @property
    def wanted(self) -> frozenset[tuple[int, int]]:
        return frozenset((block, place) for block in self.blocks for place, _ in self.passes)


def choose_passes(config: InferenceConfig, blocks: str | None, steps: str | None) -> ChosenPasses:
    """From `--blocks` and `--steps`. Raises InputError for what a video of this configuration does not have."""
    if config.rolling is not None:
        raise InputError(
            "rolling: passes over several blocks at once cannot be told apart by block; record with rolling=null"
        )
    count = len(config.denoising_step_list)
    first = config.denoising_step_list_first_chunk or config.first_frame_denoising_step_list
    names = [*(str(step) for step in range(count)), CLEAN]
    chosen = names if steps is None else [name.strip() for name in steps.split(",")]
    for name in chosen:
        if name not in names:
            raise InputError(f"--steps: {name!r} is none of {', '.join(names)}")
    last = config.num_blocks - (2 if CLEAN in chosen else 1)
    reason = "the first block sees nothing earlier" + ", the last has no clean pass" * (CLEAN in chosen)
    if last < 1:
        raise InputError(f"num_output_frames: {config.num_output_frames} leave no block to record ({reason})")
    numbers = [str(block) for block in range(1, last + 1)]
    wanted = numbers if blocks is None else [number.strip() for number in blocks.split(",")]
    for number in wanted:
        if number not in numbers:
            raise InputError(f"--blocks: {number!r} is none of {numbers[0]} to {numbers[-1]}; {reason}")
    places = sorted({names.index(name) for name in chosen})
    return ChosenPasses(
        tuple(sorted({int(number) for number in wanted})),
        tuple((p, names[p]) for p in places),
        count + 1,
        (count if first is None else len(first)) + 1,
    )


def role_settings(config: InferenceConfig) -> DummyForcingConfig:
    """How roles would be found, also where they are given, or there are none (half of them are dummy then)."""
    with_roles = has_roles(config.dummy_forcing)
    forcing = config.dummy_forcing if with_roles else DummyForcingConfig(num_dummy=0.5)
    return replace(forcing, roles=None)


def watched_policy(config: InferenceConfig, context: str) -> ContextPolicy:
    """One retention for all heads: the dense setting, or what a run keeps until it knows the roles ("initial")."""
    forcing = role_settings(config) if context == "initial" else replace(config.dummy_forcing, enabled=False)
    policy = policy_from_config(config.model_kwargs, forcing, config.num_frame_per_block)
    return ContextPolicy(policy.name, policy.initial, window_sinks=policy.window_sinks)


@dataclass(frozen=True)
class Recording:
    """What is to be recorded; `texts` are prompts in place of the configuration's."""

    config: InferenceConfig
    passes: ChosenPasses
    query_share: float
    context: str
    texts: tuple[str, ...] = ()


def jobs_of(config: InferenceConfig, texts: Sequence[str]) -> list[VideoJob]:
    """The configuration's jobs, or those of `texts` if there are any. Raises InputError."""
    if not texts:
        return read_jobs(config)
    stems = output_stems(texts, config.save_with_index)
    chosen = list(enumerate(zip(texts, stems, strict=True)))
    if config.inference_iter != -1:
        chosen = chosen[: config.inference_iter]
    check_count(config, len(chosen) * config.num_samples)
    folder, samples = Path(config.output_folder), range(config.num_samples)
    return [
        VideoJob((text,), (0,), index, sample, video_seed(config.seed, index, sample), folder / f"{stem}-{sample}.mp4")
        for index, (text, stem) in chosen
        for sample in samples
    ]


def record(recording: Recording, device: torch.device, about: Mapping[str, Any]) -> Atlas:
    """Make every video of the configuration as far as it is needed. Raises InputError for files that do not fit."""
    config, chosen = recording.config, recording.passes
    jobs = jobs_of(config, recording.texts)
    generator, embed = watched_generator(config, jobs, watched_policy(config, recording.context), device)
    geometry = geometry_of(config, generator.model.config.in_dim)
    recorder = PassRecorder(chosen.wanted, chosen.count, geometry.tokens_per_frame, recording.query_share)
    videos = list(_videos(generator, geometry, jobs, embed, recorder, chosen))
    attention = {b: torch.stack([video[b][0] for video in videos]) for b in chosen.blocks}
    entropy = {b: torch.stack([video[b][1] for video in videos]) for b in chosen.blocks}
    frames = {b: tuple(sorted(recorder.seen[b, chosen.passes[0][0]].frames)) for b in chosen.blocks}
    passes = tuple(name for _, name in chosen.passes)
    prompts = tuple(job.prompts[0] for job in jobs)
    return Atlas(attention, entropy, frames, passes, prompts, role_settings(config), config.num_frame_per_block, about)


def watched_generator(
    config: InferenceConfig, jobs: Sequence[VideoJob], policy: ContextPolicy, device: torch.device
) -> tuple[BlockGenerator, PromptEncoder]:
    """A generator under `policy`, and what has encoded the jobs' first prompts. Raises InputError."""
    sizes, settings = check_before_loading(config, device)
    role_settings(config).budget.check(sizes.num_layers, sizes.num_heads)
    prompts = PromptEncoder(config, device, sizes.text_len)
    prompts.prepare(job.prompts[0] for job in jobs)
    model = load_transformer(config, sizes, device, choose_dtype(config, device), checked=True)
    watched: GeneratorSettings = replace(settings, policy=policy, teacache_threshold=None, reclassify_on_switch=False)
    return BlockGenerator(model, watched), prompts


def _videos(
    generator: BlockGenerator,
    geometry: LatentGeometry,
    jobs: Sequence[VideoJob],
    embed: PromptEncoder,
    recorder: PassRecorder,
    chosen: ChosenPasses,
) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Of every video, by block: attention [P, layers, heads, context frames + 1] and entropy [P, layers, heads]."""
    for number, job in enumerate(jobs):
        recorder.begin()
        watch(generator, geometry, job, embed, recorder, chosen.blocks[-1])
        seen = recorder.seen
        yield {
            block: (
                torch.stack([seen[block, place].by_frame() for place, _ in chosen.passes]).cpu(),
                torch.stack([seen[block, place].entropy() for place, _ in chosen.passes]).cpu(),
            )
            for block in chosen.blocks
        }
        logger.info("video %d of %d is recorded", number + 1, len(jobs))


def watch(
    generator: BlockGenerator,
    geometry: LatentGeometry,
    job: VideoJob,
    embed: PromptEncoder,
    observer: Observer,
    last_block: int,
) -> None:
    """Make the job's video up to `last_block` and its clean pass, if it has one."""
    session = Session(generator, geometry, NoiseStream([job.noise_seed]), embed, live=False, keep_buffers=True)
    session.plan([(0, job.prompts[0])])
    with session, session.rollout.cache.observed(observer):
        for block in session:
            if block.index > last_block:
                break  # asking for this block has made the clean pass of the one before
