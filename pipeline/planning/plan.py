"""What a run will do and what memory it will take, found out without loading or computing anything.

Sizes come from the classes themselves, run on the meta device: the same model, cache and decoder that a run uses. The
numbers are bytes of tensors; what a GPU's libraries and allocator add is not in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dummy.roles import Role
from pipeline.config.config import InferenceConfig, check_against_model, geometry_of
from pipeline.planning.cost import assumed_roles, cost_lines, possible_roles
from pipeline.runtime.decoding import DecodeStrategy, fastest_strategy
from pipeline.runtime.inputs import GeneratorSettings
from pipeline.runtime.loading import (
    META,
    choose_dtype,
    choose_vae_device,
    model_config_file,
    model_sizes,
    needs_vae,
    published_sizes,
    read_sized_generator,
    require_readable,
)
from utils.memory import PeakTracker, format_bytes, memory_of
from utils.user_paths import exists, is_folder, look
from wan.attention.cache import KVCache
from wan.attention.head_group import CacheBytes, Retention
from wan.checkpoints.files import container_of
from wan.config import WAN_1_3B, ModelConfig
from wan.geometry import LatentGeometry, pixel_frames
from wan.transformer.model import CausalWanModel
from wan.vae.memory import decode_bytes
from wan.vae.preview import PreviewDecoder
from wan.vae.streaming import LatentDecoder
from wan.vae.vae import VAE

GPU = torch.device("cuda")
TILES = (960, 640, 512, 384)  # pixels; below, the tiles' halos cost more memory than smaller tiles save
MOST_TILES = 24  # more of them cost more memory for their halos than their size saves, and time to plan
RESERVE = 0.1  # of the device's memory, for its libraries and the allocator
PUBLISHED_TEXT_ENCODER = 11_361_920_418  # bytes of models_t5_umt5-xxl-enc-bf16.pth


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part for one video at a time. `cache_before_split` counts instead of `cache` until roles are known."""

    transformer: int
    vae: int  # what decodes, and what encodes if that is another
    text: int  # cross-attention keys and values of all prompts of a video, and the copy that recordings read
    cache: CacheBytes
    cache_before_split: CacheBytes | None
    transformer_activations: int
    vae_cache: int
    vae_activations: int
    vae_cache_on_host: int  # instead of on the device
    text_encoder: int  # there before the other parts, and gone before they come
    on_side_stream: bool = False  # a block is decoded while the next is denoised
    vae_elsewhere: bool = False  # on another device than the rest

    @property
    def peak(self) -> int:
        """The most that is there at once while videos are made."""
        caches = [self.cache.total, self.cache_before_split.total if self.cache_before_split else 0]
        standing = self.transformer + self.text + max(caches)
        if self.vae_elsewhere:
            return standing + self.transformer_activations
        at_work = (self.transformer_activations, self.vae_activations)
        return standing + self.vae + self.vae_cache + (sum(at_work) if self.on_side_stream else max(at_work))

    @property
    def vae_peak(self) -> int:
        """The most that the VAE alone takes."""
        return self.vae + self.vae_cache + self.vae_activations

    def lines(self) -> list[str]:
        rows = [
            ("transformer weights", self.transformer),
            ("VAE weights", self.vae),
            ("text keys and values", self.text),
            ("cache, kept frames", self.cache.kept),
            ("cache, the block's own slots", self.cache.own),
            ("cache, unturned sinks (relative RoPE)", self.cache.unrotated_sink_keys),
            ("transformer activations, peak", self.transformer_activations),
            ("VAE cache", self.vae_cache),
            ("VAE activations, peak", self.vae_activations),
        ]
        if self.cache_before_split is not None:
            rows.insert(6, ("(cache until the roles are known)", self.cache_before_split.total))
        table = [f"  {name:40}{format_bytes(size):>12}" for name, size in rows if size]
        table.append(f"  {'peak while videos are made':40}{format_bytes(self.peak):>12}")
        if self.vae_elsewhere:
            table.append(f"  {'peak on the device of the VAE':40}{format_bytes(self.vae_peak):>12}")
        if self.vae_cache_on_host:
            table.append(f"  {'VAE cache, in the memory of the host':40}{format_bytes(self.vae_cache_on_host):>12}")
        if self.text_encoder:
            table.append(f"  {'text encoder (freed before that)':40}{format_bytes(self.text_encoder):>12}")
        return table


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


@dataclass(frozen=True)
class Planner:
    """Builds plans for one model size and one decoder (on the meta device)."""

    sizes: ModelConfig
    vae: LatentDecoder
    dtype: torch.dtype
    text_encoder_bytes: int = 0
    vae_device: torch.device = GPU  # of the run; which of them decodes in which way
    encoder_bytes: int = 0  # of weights, where another than the decoder encodes
    model: CausalWanModel = field(init=False)

    def __post_init__(self) -> None:
        with META:
            model = CausalWanModel(self.sizes).to(self.dtype)
        model.attention = _no_scores
        object.__setattr__(self, "model", model)

    def memory(
        self, config: InferenceConfig, settings: GeneratorSettings, strategy: DecodeStrategy | None = None
    ) -> MemoryPlan:
        """The plan for one video of this configuration, decoded in this way, or the fastest."""
        strategy = strategy or fastest_strategy(
            self.vae_device, config.num_frame_per_block, config.overlap is not False
        )
        geometry = geometry_of(config, self.sizes.in_dim)
        split = settings.policy.split
        relative = settings.window if settings.relative_rope else None
        cache = self.model.new_cache(geometry, 1, settings.policy.initial, relative)
        before = None
        if settings.policy.table is not None:
            cache.allocate(settings.policy.table.layout())
        elif split is not None:
            before = None if split.from_start else cache.bytes()
            roles = assumed_roles(self.sizes, split, geometry.num_frames - geometry.frames_per_block)
            cache.allocate(split.layout(roles))
        scale = self.vae.spatial_scale
        sides = geometry.height * scale, geometry.width * scale
        block = geometry.frames_per_block
        decode = decode_bytes(
            self.vae,
            *sides,
            strategy.tile,
            block,
            strategy.frames,
            frame_chunk=strategy.frame_chunk,
            on_host=strategy.on_host,
        )
        return MemoryPlan(
            transformer=_bytes(self.model.parameters()),
            vae=_bytes(self.vae.module.parameters()) + self.encoder_bytes,
            text=self._text_bytes() * self._texts(config),
            cache=cache.bytes(),
            cache_before_split=before,
            transformer_activations=self._activations(geometry, cache),
            vae_cache=0 if strategy.on_host else decode.cache,
            vae_cache_on_host=decode.cache if strategy.on_host else 0,
            vae_activations=decode.activations,
            text_encoder=self.text_encoder_bytes,
            on_side_stream=strategy.on_side_stream,
            vae_elsewhere=config.vae_device != "auto",
        )

    def strategy(self, config: InferenceConfig, settings: GeneratorSettings, available: int) -> DecodeStrategy:
        """The first of `ways` with which the plan's peak leaves a reserve of the `available` bytes, or the last."""
        room = available * (1 - RESERVE)
        strategies = list(self.strategies(config))
        for strategy in strategies[:-1]:
            plan = self.memory(config, settings, strategy)
            if (plan.vae_peak if plan.vae_elsewhere else plan.peak) <= room:
                return strategy
        return strategies[-1]

    def strategies(self, config: InferenceConfig) -> Iterator[DecodeStrategy]:
        """How the configuration lets videos be decoded, from the fastest to what takes least memory."""
        fast = fastest_strategy(self.vae_device, config.num_frame_per_block, config.overlap is not False)
        if isinstance(config.vae_tile, int):
            fast = replace(fast, tile=config.vae_tile)
        small = DecodeStrategy(1, fast.tile, frame_chunk=1)
        if config.low_memory is not True:
            yield fast
        if config.low_memory is not False:
            yield small
        tiles = [fast.tile]
        if config.vae_tile == "auto" and self.vae.tiles:
            height, width = config.pixel_size
            tiles = [tile for tile in TILES if -(-height // tile) * -(-width // tile) <= MOST_TILES] or [TILES[0]]
            yield from (replace(small, tile=tile) for tile in tiles)
        if config.low_memory is not False and self.vae_device.type != "cpu":
            # Not in the smallest pieces: each of them brings the whole cache there and back.
            yield from (DecodeStrategy(1, tile, on_host=True) for tile in tiles)
            yield DecodeStrategy(1, tiles[-1], frame_chunk=2, on_host=True)

    def _texts(self, config: InferenceConfig) -> int:
        """The prompts of a video, and one more that recorded passes read from."""
        recorded = config.engine in ("auto", "graphed") and self.vae_device.type == "cuda"
        return len(config.switch_frame_indices) + 1 + recorded

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
    require_readable(config)
    dtype = choose_dtype(config, device)
    sizes = planned_sizes(config)
    place = choose_vae_device(config, device)
    decoder = _decoder(config, dtype).lay_out_for(place)
    apart = needs_vae(config) and not isinstance(decoder, VAE)
    encoder_bytes = _bytes(_vae(config, dtype).module.parameters()) if apart else 0
    return Planner(sizes, decoder, dtype, _text_encoder_bytes(config, device), place, encoder_bytes)


def planned_sizes(config: InferenceConfig) -> ModelConfig:
    """The transformer's sizes; the published ones that the folder's name promises where its file is missing.

    They are compared with the generator's file if that is there, before anything of these sizes is built.
    """
    if exists(model_config_file(config), "model_name"):
        sizes = model_sizes(config)
        source = config.generator_path
        if source.is_file() and container_of(source) != "legacy pickle":  # that would be read whole
            read_sized_generator(config, sizes)
        return sizes
    sizes = published_sizes(config) or WAN_1_3B
    check_against_model(config, sizes)
    return sizes


def _vae(config: InferenceConfig, dtype: torch.dtype) -> VAE:
    return VAE.load(config.vae_path, dtype, META) if exists(config.vae_path, "model_name") else VAE.published(dtype)


def _decoder(config: InferenceConfig, dtype: torch.dtype) -> LatentDecoder:
    path = config.preview_path
    if path is None:
        return _vae(config, dtype)
    return PreviewDecoder.load(path, dtype, META) if exists(path, "decoder") else PreviewDecoder.published(dtype)


def _text_encoder_bytes(config: InferenceConfig, device: torch.device) -> int:
    """Of Wan's file, which holds bf16 and little else; the published size where it is another layout or missing."""
    path = config.text_encoder_path
    found = look(path, "model_name")
    stored = found.st_size if found is not None and not is_folder(path) else PUBLISHED_TEXT_ENCODER
    return stored * choose_dtype(config, device).itemsize // torch.bfloat16.itemsize


def _no_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as fused kernels do it: nothing but the result is allocated."""
    return torch.empty_like(q)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nelement() * tensor.element_size() for tensor in tensors)


def head_contexts(settings: GeneratorSettings, sizes: ModelConfig) -> list[HeadContext]:
    """What each kind of head sees, before and after a split."""
    policy = settings.policy
    if policy.table is not None:
        return [HeadContext(policy.name, f"{count} heads", kept) for kept, count in policy.table.counts().items()]
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


def choose_strategy(config: InferenceConfig, settings: GeneratorSettings, device: torch.device) -> DecodeStrategy:
    """How the run decodes, so that it fits the device."""
    place = choose_vae_device(config, device)
    return planner_for(config, device).strategy(config, settings, memory_of(place))


def plan_lines(
    config: InferenceConfig, settings: GeneratorSettings, planner: Planner, device: torch.device
) -> list[str]:
    """Geometry, policy and memory of a run as text."""
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
        f"Policy: {settings.policy.name} (latent frames that a head keeps of what came before)",
        *(context.line(max_past, geometry.frames_per_block) for context in head_contexts(settings, planner.sizes)),
    ]
    lines += cost_lines(config, settings.policy, planner.sizes, geometry)
    strategy = planner.strategy(config, settings, memory_of(choose_vae_device(config, device)))
    path = config.preview_path
    preview = "" if path is None else f"by the preview decoder {path}, of less quality than the VAE; "
    lines.append(f"Decoding: {preview}{strategy}")
    return [*lines, "Memory, as tensors:", *planner.memory(config, settings, strategy).lines()]
