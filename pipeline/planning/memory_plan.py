"""What a run holds in memory, part by part, and the most of it at once."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.planning.stages import VideoStages
from utils.memory import format_bytes
from wan.attention.head_group import CacheBytes


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part, for the videos that are made at a time."""

    transformer: int
    vae: int  # what decodes, and what encodes if that is another
    text: int  # cross-attention keys and values of a prompt, and the copy that recordings read
    stages: VideoStages  # the caches, one after the other, and the activations over each
    text_encoder: int  # there before the other parts, and gone before they come
    vae_cache: int = 0
    vae_activations: int = 0
    vae_cache_on_host: int = 0  # instead of on the device
    recordings: int = 0  # private memory of captured passes, which those that run as they are cannot use
    vae_recordings: int = 0
    on_side_stream: bool = False  # a block is decoded while the next is denoised
    gathered: int = 0  # a layer's weights while it runs, where each process holds a shard
    vae_elsewhere: bool = False  # on another device than the rest

    @property
    def cache(self) -> CacheBytes:
        """Once the roles of heads are known."""
        return self.stages.block.cache

    @property
    def cache_before_split(self) -> CacheBytes | None:
        """Instead of `cache` until roles are known."""
        return None if self.stages.before_split is None else self.stages.before_split.cache

    @property
    def transformer_activations(self) -> int:
        return self.stages.block.activations

    @property
    def peak(self) -> int:
        """The most that is there at once while videos are made."""
        standing = self.transformer + self.gathered + self.text + self.recordings
        if self.vae_elsewhere:
            return standing + max(stage.total for stage in self.stages)
        together = sum if self.on_side_stream else max
        at_work = (stage.cache.total + together((stage.activations, self.vae_activations)) for stage in self.stages)
        return standing + self.vae + self.vae_recordings + self.vae_cache + max(at_work)

    @property
    def vae_peak(self) -> int:
        """The most that the VAE alone takes."""
        return self.vae + self.vae_recordings + self.vae_cache + self.vae_activations

    def lines(self) -> list[str]:
        before, prompt, switch = self.stages.before_split, self.stages.prompt, self.stages.switch
        rows = [
            ("transformer weights" + (", a shard" if self.gathered else ""), self.transformer),
            ("a layer's weights, gathered", self.gathered),
            ("VAE weights", self.vae),
            ("text keys and values", self.text),
            ("cache, kept frames", self.cache.kept),
            ("cache, the block's own slots", self.cache.own),
            ("cache, unturned sinks (relative RoPE)", self.cache.unrotated_sink_keys),
            ("(cache until heads have parted)", before.cache.total if before is not None else 0),
            ("(cache at a prompt switch)", switch.cache.total if switch is not None else 0),
            ("transformer activations, peak", self.transformer_activations),
            ("(where heads are observed)", before.activations if before is not None else 0),
            ("(where another prompt is there already)", prompt.activations if prompt is not None else 0),
            ("(where a prompt switch encodes anew)", switch.activations if switch is not None else 0),
            ("captured passes, memory of their own", self.recordings + self.vae_recordings),
            ("VAE cache", self.vae_cache),
            ("VAE activations, peak", self.vae_activations),
        ]
        table = [f"  {name:40}{format_bytes(size):>12}" for name, size in rows if size]
        table.append(f"  {'peak while videos are made':40}{format_bytes(self.peak):>12}")
        if self.vae_elsewhere:
            table.append(f"  {'peak on the device of the VAE':40}{format_bytes(self.vae_peak):>12}")
        if self.vae_cache_on_host:
            table.append(f"  {'VAE cache, in the memory of the host':40}{format_bytes(self.vae_cache_on_host):>12}")
        if self.text_encoder:
            table.append(f"  {'text encoder (freed before that)':40}{format_bytes(self.text_encoder):>12}")
        return table
