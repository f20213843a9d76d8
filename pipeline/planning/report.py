"""What a dry run says of a run: its video, what heads see, what it costs and takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dummy.roles import Role
from pipeline.config.config import InferenceConfig, geometry_of
from pipeline.planning.cost import assumed_roles, cost_lines, possible_roles
from pipeline.planning.memory_advice import shortage
from pipeline.planning.memory_plan import MemoryPlan
from pipeline.planning.plan import Planner
from pipeline.planning.scale import scale_lines, scale_of
from pipeline.planning.together import Room, TogetherPlanner
from pipeline.runtime.inputs import GeneratorSettings
from pipeline.runtime.loading import choose_vae_device, require_heads
from utils.errors import shown
from utils.memory import memory_of
from wan.attention.head_group import Retention
from wan.config import ModelConfig
from wan.geometry import pixel_frames


@dataclass(frozen=True)
class HeadContext:
    """What heads of one kind see: `heads` (how many, in words) keep `retention`."""

    name: str
    heads: str
    retention: Retention

    def line(self, max_past: int, block: int) -> str:
        kept = min(self.retention.total, max_past)
        recent = "all" if self.retention.total > max_past else str(self.retention.recent)
        seen = f"first {self.retention.sink} + last {recent} = {kept} frames, {block} own"
        return f"  {self.name:22}{self.heads:>14}: {seen}"


def head_contexts(settings: GeneratorSettings, sizes: ModelConfig) -> list[HeadContext]:
    """What each kind of head sees, before and after a split."""
    policy = settings.policy
    if policy.table is not None:
        return [HeadContext(policy.name, f"{count} heads", kept) for kept, count in policy.table.counts().items()]
    if policy.online is not None:
        table = policy.online.assumed(sizes.num_layers, sizes.num_heads)
        after = [HeadContext("for example", f"{count} heads", kept) for kept, count in table.counts().items()]
        return [HeadContext(f"blocks 0 to {policy.online.ar_start}", "all heads", policy.initial), *after]
    if policy.split is None:
        return [HeadContext(policy.name, "all heads", policy.initial)]
    split = policy.split
    by_role = split.retentions(assumed_roles(sizes, split))
    counts = [roles.counts() for roles in possible_roles(sizes, split)]
    after = []
    for role in Role:
        numbers = dict.fromkeys(str(number) for number in sorted(one[role] for one in counts))
        after.append(HeadContext(role.name.lower(), f"{' to '.join(numbers)} heads", by_role[role]))
    before = [] if split.from_start else [HeadContext(f"blocks 0 to {split.ar_start}", "all heads", policy.initial)]
    return before + after


def plan_lines(
    config: InferenceConfig,
    settings: GeneratorSettings,
    planner: Planner,
    device: torch.device,
    batch: int = 1,
    processes: int = 1,
) -> list[str]:
    """Geometry, policy and memory of a run as text; by as many processes together as `parallel` says, or, where that
    gives no number, by all `processes`; with a warning if the device cannot hold it."""
    geometry = geometry_of(config, planner.sizes.in_dim)
    height, width = config.pixel_size
    max_past = geometry.num_frames - geometry.frames_per_block
    lines = [
        f"Video: {width}x{height}, {pixel_frames(geometry.num_frames)} frames at {config.fps} fps "
        f"({pixel_frames(geometry.num_frames) / config.fps:.2f} s)",
        f"Latents: {geometry.num_frames} frames of {geometry.height}x{geometry.width} in {geometry.num_blocks} blocks "
        f"of {geometry.frames_per_block}; {geometry.tokens_per_frame} tokens a frame",
        f"Model: {planner.sizes.num_layers} layers x {planner.sizes.num_heads} heads, "
        f"{sum(p.nelement() for p in planner.model.parameters()) / 1e6:.1f} M parameters, {planner.dtype}",
        *(f"LoRA: {shown(lora.path)} times {lora.strength:g}" for lora in config.lora_files),
        f"Policy: {settings.policy.name} (latent frames that a head keeps of what came before)",
        *(context.line(max_past, geometry.frames_per_block) for context in head_contexts(settings, planner.sizes)),
    ]
    lines += cost_lines(config, settings.policy, planner.sizes, geometry)
    path = config.preview_path
    preview = "" if path is None else f"by the preview decoder {path}, of less quality than the VAE; "
    about = "" if batch == 1 else f", for {batch} videos at a time"
    ranks = config.ranks or (1 if config.parallel is None else processes)

    def warning(plan: MemoryPlan) -> list[str]:
        too_little = shortage(plan, config, device, batch, ranks)
        return [] if too_little is None else [f"Warning: {too_little}"]

    if ranks == 1:
        strategy, memory = planner.fitting(config, settings, memory_of(choose_vae_device(config, device)), batch)
        lines += [f"Decoding: {preview}{strategy}", f"Memory, as tensors{about}:", *memory.lines()]
        return lines + warning(memory)
    require_heads(config, planner.sizes, ranks)
    steps, itemsize = len(config.denoising_step_list), planner.dtype.itemsize
    scale = scale_of(settings.policy, planner.sizes, geometry, ranks, steps, itemsize)
    together = TogetherPlanner(planner, config, settings, ranks, batch)
    plan = together.fitting(Room.here(config, device, ranks))
    lines += [*scale_lines(scale), *together.about_shards(plan)]
    lines += [f"Decoding: {preview}{plan.strategy}", *together.about_tiles(plan)]
    return [*lines, *plan.lines(about), *warning(plan.most)]
