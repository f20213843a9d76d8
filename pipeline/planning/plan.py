"""What a run will do and what memory it will take, found out without loading or computing anything.

Sizes come from the classes themselves, run on the meta device: the same model, cache and decoder that a run uses. The
numbers are bytes of tensors; what a GPU's libraries and allocator add is not in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from pipeline.config.config import InferenceConfig, check_against_model, geometry_of
from pipeline.planning.memory_plan import MemoryPlan
from pipeline.planning.stages import StagePlanner, VideoStages, no_scores
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
from utils.memory import memory_of
from utils.prompts import is_storyboard_file
from utils.user_paths import exists, is_folder, look
from wan.attention.exchange import PlannedExchange
from wan.checkpoints.files import TooLarge, container_of
from wan.config import WAN_1_3B, ModelConfig
from wan.text import encoder_bytes
from wan.transformer.model import CausalWanModel
from wan.vae.memory import decode_bytes
from wan.vae.preview import PreviewDecoder
from wan.vae.streaming import LatentDecoder
from wan.vae.vae import VAE

GPU = torch.device("cuda")
TILES = (960, 640, 512, 384)  # pixels; below, the tiles' halos cost more memory than smaller tiles save
MOST_TILES = 24  # more of them cost more memory for their halos than their size saves, and time to plan
RESERVE = 0.1  # of the device's memory, for its libraries and the allocator
COMPILED = 2.5  # activations of a compiled decoder, whose windows are all there from the start, to those of one that is
# not: 3.85 GiB to 1.57 at 480p, on an H200
PUBLISHED_TEXT_ENCODER = 11_361_920_418  # bytes of models_t5_umt5-xxl-enc-bf16.pth


@dataclass(frozen=True)
class Planner:
    """Builds plans for one model size and one decoder (on the meta device)."""

    sizes: ModelConfig
    vae: LatentDecoder
    dtype: torch.dtype
    text_encoder_bytes: int = 0
    vae_device: torch.device = GPU  # of the run; which of them decodes in which way
    encoder_bytes: int = 0  # of weights, where another than the decoder encodes
    device: torch.device = GPU  # of the run
    model: CausalWanModel = field(init=False)

    def __post_init__(self) -> None:
        with META:
            model = CausalWanModel(self.sizes).to(self.dtype)
        model.attention = no_scores
        object.__setattr__(self, "model", model)

    def memory(
        self,
        config: InferenceConfig,
        settings: GeneratorSettings,
        strategy: DecodeStrategy | None = None,
        batch: int = 1,
        stages: VideoStages | None = None,
        share: tuple[int, int] | None = None,
    ) -> MemoryPlan:
        """The plan for `batch` videos at a time, decoded in this way, or the fastest; `stages`: as `stages` finds;
        `share`: (rank, ranks) of a process, where tiles are dealt."""
        strategy = strategy or fastest_strategy(
            self.vae_device, config.num_frame_per_block, config.overlap is not False
        )
        stages = stages or self.stages(config, settings, batch)
        plan = self.undecoded(config, strategy, stages)
        geometry, scale = geometry_of(config, self.sizes.in_dim), self.vae.spatial_scale
        decode = decode_bytes(
            self.vae,
            geometry.height * scale,
            geometry.width * scale,
            strategy.tile,
            geometry.frames_per_block,
            strategy.frames,
            batch,
            frame_chunk=strategy.frame_chunk,
            on_host=strategy.on_host,
            share=share,
        )
        recorded = _recorded(config, self.vae_device) and strategy.steady
        # A video's first block is decoded as it comes: its first frame, and then fewer than are recorded.
        alone = recorded and geometry.frames_per_block == 1
        return replace(
            plan,
            vae_cache=0 if strategy.on_host else decode.cache,
            vae_cache_on_host=decode.cache if strategy.on_host else 0,
            vae_activations=decode.first if alone else decode.activations,
            vae_recordings=int(decode.activations * COMPILED) if recorded else 0,
        )

    def undecoded(self, config: InferenceConfig, strategy: DecodeStrategy, stages: VideoStages) -> MemoryPlan:
        """With the decoder's weights, and nothing of what it takes when it is at work."""
        recorded = _recorded(config, self.device)
        return MemoryPlan(
            transformer=_bytes(self.model.parameters()),
            vae=_bytes(self.vae.module.parameters()) + self.encoder_bytes,
            text=stages.text * (2 if recorded else 1),
            stages=stages,
            text_encoder=self.text_encoder_bytes,
            recordings=stages.block.activations if recorded else 0,
            on_side_stream=strategy.on_side_stream,
            vae_elsewhere=config.vae_device != "auto",
        )

    def stages(
        self,
        config: InferenceConfig,
        settings: GeneratorSettings,
        batch: int = 1,
        exchange: PlannedExchange | None = None,
    ) -> VideoStages:
        """What caches and passes take, of one rank of several if there is an `exchange`."""
        geometry = geometry_of(config, self.sizes.in_dim)
        storyboards = is_storyboard_file(Path(config.data_path))  # which may have switches of their own, anywhere
        switches = geometry.block_starts() if storyboards else config.switch_frame_indices
        self.model.exchange = exchange
        return StagePlanner(self.model, geometry, settings, batch).stages(switches)

    def strategy(
        self, config: InferenceConfig, settings: GeneratorSettings, available: int, batch: int = 1
    ) -> DecodeStrategy:
        """The first of `strategies` with which the peak leaves a reserve of the `available` bytes, or the last."""
        return self.fitting(config, settings, available, batch)[0]

    def fitting(
        self, config: InferenceConfig, settings: GeneratorSettings, available: int, batch: int = 1
    ) -> tuple[DecodeStrategy, MemoryPlan]:
        """As `strategy`, with what it takes."""
        room = available * (1 - RESERVE)
        stages = self.stages(config, settings, batch)
        *others, last = self.strategies(config)
        for strategy in others:
            if decoding_peak(self.undecoded(config, strategy, stages)) > room:
                continue  # even without the decoder's work, which takes longer to find out
            plan = self.memory(config, settings, strategy, batch, stages)
            if decoding_peak(plan) <= room:
                return strategy, plan
        return last, self.memory(config, settings, last, batch, stages)

    def strategies(self, config: InferenceConfig) -> Iterator[DecodeStrategy]:
        """As the function, for this decoder."""
        return strategies(config, self.vae_device, self.vae.tiles)


def strategies(config: InferenceConfig, device: torch.device, tiled: bool) -> Iterator[DecodeStrategy]:
    """How the configuration lets videos be decoded on `device`, from the fastest to what takes least memory; `tiled`:
    whether the decoder can work in tiles."""
    fast = fastest_strategy(device, config.num_frame_per_block, config.overlap is not False)
    if isinstance(config.vae_tile, int):
        fast = replace(fast, tile=config.vae_tile)
    small = DecodeStrategy(1, fast.tile, frame_chunk=1)
    if config.low_memory is not True:
        yield fast
    if config.low_memory is not False:
        yield small
    tiles = [fast.tile]
    if config.vae_tile == "auto" and tiled:
        height, width = config.pixel_size
        tiles = [tile for tile in TILES if -(-height // tile) * -(-width // tile) <= MOST_TILES] or [TILES[0]]
        yield from (replace(small, tile=tile) for tile in tiles)
    if config.low_memory is not False and device.type != "cpu":
        # Not in the smallest pieces: each of them brings the whole cache there and back.
        yield from (DecodeStrategy(1, tile, on_host=True) for tile in tiles)
        yield DecodeStrategy(1, tiles[-1], frame_chunk=2, on_host=True)


def decoding_peak(plan: MemoryPlan) -> int:
    """On the device that decodes."""
    return plan.vae_peak if plan.vae_elsewhere else plan.peak


def _recorded(config: InferenceConfig, device: torch.device) -> bool:
    """Whether what runs on the device is captured, as far as can be told before it is tried."""
    return config.engine in ("auto", "graphed") and device.type == "cuda"


def planner_for(config: InferenceConfig, device: torch.device) -> Planner:
    """A planner for the model that the configuration names; files that are missing count at their published sizes."""
    require_readable(config)
    dtype = choose_dtype(config, device)
    sizes = planned_sizes(config)
    place = choose_vae_device(config, device)
    decoder = _decoder(config, dtype).lay_out_for(place)
    apart = needs_vae(config) and not isinstance(decoder, VAE)
    encoder_bytes = _bytes(_vae(config, dtype).module.parameters()) if apart else 0
    return Planner(sizes, decoder, dtype, _text_encoder_bytes(config, device), place, encoder_bytes, device)


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
    """What loading it takes; by the size of a file that is not mapped into memory, or of the published one where it is
    missing, both of which hold bf16 and little else."""
    path, dtype = config.text_encoder_path, choose_dtype(config, device)
    found = look(path, "model_name")
    if found is not None and (is_folder(path) or container_of(path) != "legacy pickle"):  # that would be read whole
        with suppress(TooLarge):  # a dry run may be on another machine than the run
            return encoder_bytes(path, dtype)
    stored = PUBLISHED_TEXT_ENCODER if found is None or is_folder(path) else found.st_size
    return stored * dtype.itemsize // torch.bfloat16.itemsize


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nelement() * tensor.element_size() for tensor in tensors)


def choose_strategy(
    config: InferenceConfig, settings: GeneratorSettings, device: torch.device, batch: int = 1
) -> DecodeStrategy:
    """How the run decodes `batch` videos at a time, so that they fit into what the device has for this process."""
    place = choose_vae_device(config, device)
    fastest, *others = strategies(config, place, tiled=True)
    if not others:
        return fastest  # there is nothing to choose, so nothing to plan
    return planner_for(config, device).strategy(config, settings, memory_of(place), batch)
