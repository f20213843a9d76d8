"""What a run will do and what memory it will take, found out without loading or computing anything.

Sizes come from the classes themselves, run on the meta device: the same model, cache and decoder that a run uses. The
numbers are bytes of tensors; what a GPU's libraries and allocator add is not in them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dummy.policy import HeadSplit
from dummy.roles import HeadRoles, Role
from pipeline.config import InferenceConfig, check_against_model
from pipeline.generator import GeneratorSettings
from pipeline.loading import META, choose_dtype, model_config_file, model_sizes
from utils.memory import PeakTracker, format_bytes, memory_of
from wan.cache import CacheBytes, KVCache, Retention
from wan.config import WAN_1_3B, WAN_14B, ModelConfig
from wan.geometry import LatentGeometry, pixel_frames
from wan.model import CausalWanModel
from wan.vae import VAE
from wan.vae_memory import decode_bytes

TILES = (960, 640, 512, 384)  # pixels; below, the tiles' halos cost more memory than smaller tiles save
MOST_TILES = 24  # more of them cost more memory for their halos than their size saves, and time to plan
RESERVE = 0.1  # of the device's memory, for its libraries and the allocator
PUBLISHED_TEXT_ENCODER = 11_361_920_418  # bytes of models_t5_umt5-xxl-enc-bf16.pth


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part for one video at a time. `cache_before_split` counts instead of `cache` until roles are known."""

    transformer: int
    vae: int
    text: int  # cross-attention keys and values of all prompts of a video
    cache: CacheBytes
    cache_before_split: CacheBytes | None
    transformer_activations: int
    vae_cache: int
    vae_activations: int
    text_encoder: int  # there before the other parts, and gone before they come

    @property
    def peak(self) -> int:
        """The most that is there at once while videos are made."""
        caches = [self.cache.total, self.cache_before_split.total if self.cache_before_split else 0]
        standing = self.transformer + self.vae + self.text + self.vae_cache
        return standing + max(caches) + max(self.transformer_activations, self.vae_activations)

    def lines(self) -> list[str]:
        rows = [
            ("transformer weights", self.transformer),
            ("VAE weights", self.vae),
            ("text keys and values", self.text),
            ("cache, kept frames", self.cache.kept),
            ("cache, the block's own slots", self.cache.own),
            ("cache, unturned sinks (relative RoPE)", self.cache.turning),
            ("transformer activations, peak", self.transformer_activations),
            ("VAE cache", self.vae_cache),
            ("VAE activations, peak", self.vae_activations),
        ]
        if self.cache_before_split is not None:
            rows.insert(6, ("(cache until the roles are known)", self.cache_before_split.total))
        table = [f"  {name:40}{format_bytes(size):>12}" for name, size in rows if size]
        table.append(f"  {'peak while videos are made':40}{format_bytes(self.peak):>12}")
        if self.text_encoder:
            table.append(f"  {'text encoder (freed before that)':40}{format_bytes(self.text_encoder):>12}")
        return table


@dataclass(frozen=True)
class HeadContext:
    """What heads of one kind see: `heads` of them (None: not known before the run) keep `retention`."""

    name: str
    heads: int | None
    retention: Retention

    def line(self, max_past: int, block: int) -> str:
        count = "all heads" if self.heads is None else f"{self.heads} heads"
        kept = min(self.retention.total, max_past)
        recent = "all" if self.retention.total > max_past else str(self.retention.recent)
        return f"  {self.name:22}{count:>11}: first {self.retention.sink} + last {recent} = {kept} frames, {block} own"


@dataclass(frozen=True)
class Planner:
    """Builds plans for one model size and one VAE (on the meta device)."""

    sizes: ModelConfig
    vae: VAE
    dtype: torch.dtype
    text_encoder_bytes: int = 0
    model: CausalWanModel = field(init=False)

    def __post_init__(self) -> None:
        with META:
            model = CausalWanModel(self.sizes).to(self.dtype)
        model.attention = _no_scores
        object.__setattr__(self, "model", model)

    def memory(self, config: InferenceConfig, settings: GeneratorSettings, tile: int | None = None) -> MemoryPlan:
        """The plan for one video of this configuration, decoded whole or in tiles of at most `tile` pixels a side."""
        geometry = _geometry(config, self.sizes)
        split = settings.policy.split
        relative = settings.window if settings.relative_rope else None
        cache = self.model.new_cache(geometry, 1, settings.policy.initial, relative)
        before = None
        if split is not None:
            before = None if split.from_start else cache.bytes()
            cache.allocate(split.layout(split.roles or assumed_roles(self.sizes, split))[1])
        scale = self.vae.spatial_scale
        decode = decode_bytes(
            self.vae, geometry.height * scale, geometry.width * scale, tile, geometry.frames_per_block
        )
        return MemoryPlan(
            transformer=_bytes(self.model.parameters()),
            vae=_bytes(self.vae.module.parameters()),
            text=self._text_bytes() * (len(config.switch_frame_indices) + 1),
            cache=cache.bytes(),
            cache_before_split=before,
            transformer_activations=self._activations(geometry, cache),
            vae_cache=decode.cache,
            vae_activations=decode.activations,
            text_encoder=self.text_encoder_bytes,
        )

    def tile(self, config: InferenceConfig, settings: GeneratorSettings, available: int) -> int | None:
        """The tile that `vae_tile` asks for; "auto" is the largest with which the plan's peak leaves a reserve of the
        `available` bytes, None (whole frames) if they do."""
        if isinstance(config.vae_tile, int):
            return config.vae_tile
        if config.vae_tile == "never":
            return None
        room = available * (1 - RESERVE)
        height, width = config.pixel_size
        few = [tile for tile in TILES if -(-height // tile) * -(-width // tile) <= MOST_TILES] or [TILES[0]]
        fitting = (tile for tile in (None, *few) if self.memory(config, settings, tile).peak <= room)
        return next(fitting, few[-1])

    def _text_bytes(self) -> int:
        """Cross-attention keys and values of one prompt."""
        return 2 * self.sizes.num_layers * self.sizes.text_len * self.sizes.dim * self.dtype.itemsize

    def _activations(self, geometry: LatentGeometry, cache: KVCache) -> int:
        with torch.inference_mode():
            time = self.model.encode_time(0.0)
            text = self.model.encode_text(torch.empty(1, self.sizes.text_len, self.sizes.text_dim, device=META))
            latents = torch.empty(1, *geometry.block_shape, device=META)
            with PeakTracker() as tracker:
                self.model(latents, time, text, cache, 0)
            return int(tracker.peak)


def planner_for(config: InferenceConfig, device: torch.device) -> Planner:
    """A planner for the model that the configuration names; files that are missing count at their published sizes."""
    dtype = choose_dtype(config, device)
    if model_config_file(config).is_file():
        sizes = model_sizes(config)
    else:
        sizes = WAN_14B if "14B" in config.model_name else WAN_1_3B
        check_against_model(config, sizes)
    vae = VAE.load(config.vae_path, dtype, META) if config.vae_path.exists() else VAE.published(dtype)
    return Planner(sizes, vae, dtype, _text_encoder_bytes(config, device))


def _text_encoder_bytes(config: InferenceConfig, device: torch.device) -> int:
    """Of Wan's file, which holds bf16 and little else; the published size where it is another layout or missing."""
    path = config.text_encoder_path
    stored = path.stat().st_size if path.is_file() else PUBLISHED_TEXT_ENCODER
    return stored * choose_dtype(config, device).itemsize // torch.bfloat16.itemsize


def _no_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as fused kernels do it: nothing but the result is allocated."""
    return torch.empty_like(q)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nelement() * tensor.element_size() for tensor in tensors)


def _geometry(config: InferenceConfig, sizes: ModelConfig) -> LatentGeometry:
    height, width = config.latent_size
    return LatentGeometry(height, width, config.num_output_frames, config.num_frame_per_block, sizes.in_dim)


def assumed_roles(sizes: ModelConfig, split: HeadSplit) -> HeadRoles:
    """Roles for a plan before any are observed: dummy heads spread evenly, the others half sink, half neighbour."""
    total = sizes.num_layers * sizes.num_heads
    others = (i for i in range(total))
    dummy = {i * total // split.num_dummy for i in range(split.num_dummy)} if split.num_dummy else set()
    codes = [Role.DUMMY if i in dummy else (Role.SINK, Role.NEIGHBOR)[next(others) % 2] for i in range(total)]
    rows = [codes[i : i + sizes.num_heads] for i in range(0, total, sizes.num_heads)]
    return HeadRoles.from_codes(rows)


def head_contexts(settings: GeneratorSettings, sizes: ModelConfig) -> list[HeadContext]:
    """What each kind of head sees, before and after a split."""
    policy = settings.policy
    if policy.split is None:
        return [HeadContext(policy.name, None, policy.initial)]
    split = policy.split
    roles = split.roles or assumed_roles(sizes, split)
    after = [HeadContext(role.name.lower(), roles.counts()[role], split.by_role[role]) for role in Role]
    before = [] if split.from_start else [HeadContext(f"blocks 0 to {split.ar_start}", None, policy.initial)]
    return before + after


def choose_tile(config: InferenceConfig, settings: GeneratorSettings, device: torch.device) -> int | None:
    """The side of the tiles in which the run decodes, None for whole frames."""
    if config.vae_tile == "auto":
        return planner_for(config, device).tile(config, settings, memory_of(device))
    return None if config.vae_tile == "never" else config.vae_tile


def plan_lines(
    config: InferenceConfig, settings: GeneratorSettings, planner: Planner, device: torch.device
) -> list[str]:
    """Geometry, policy and memory of a run as text."""
    geometry = _geometry(config, planner.sizes)
    height, width = config.pixel_size
    split = settings.policy.split
    max_past = geometry.num_frames - geometry.frames_per_block
    lines = [
        f"Video: {width}x{height}, {pixel_frames(geometry.num_frames)} frames at {config.fps} fps "
        f"({pixel_frames(geometry.num_frames) / config.fps:.2f} s)",
        f"Latents: {geometry.num_frames} frames of {geometry.height}x{geometry.width} in {geometry.num_blocks} blocks "
        f"of {geometry.frames_per_block}; {geometry.tokens_per_frame} tokens a frame",
        f"Model: {planner.sizes.num_layers} layers x {planner.sizes.num_heads} heads, "
        f"{sum(p.nelement() for p in planner.model.parameters()) / 1e6:.1f} M parameters, {planner.dtype}",
        f"Policy: {settings.policy.name} (latent frames that a head keeps of what came before)",
        *(context.line(max_past, geometry.frames_per_block) for context in head_contexts(settings, planner.sizes)),
    ]
    if split is not None and split.roles is None:
        lines.append("  (sink and neighbor heads: an even split is assumed; the run finds it out)")
    tile = planner.tile(config, settings, memory_of(device))
    lines.append("Decoding: " + ("whole frames" if tile is None else f"in tiles of at most {tile} pixels a side"))
    return [*lines, "Memory, as tensors:", *planner.memory(config, settings, tile).lines()]
