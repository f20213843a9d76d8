"""The causal Wan 2.1 diffusion transformer (arXiv 2503.20314), inference only, any size.

Parameter names are those of the published checkpoints. A pass takes the frames of one block, or more when earlier
frames are re-encoded, and attends through a `KVCache`; the model knows neither policies nor head roles, only that the
heads of its layers can be handed to a cache in an order of its own. Whatever depends on the prompt alone is in a
`TextContext`, whatever depends on the timestep alone in a `TimeContext`; both are computed once and never change.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from utils.compiled import compiled_by_size
from utils.transfer import to_device
from wan.attention.backends import AttentionFn, AttentionName, attention_backend, sdpa
from wan.attention.cache import KVCache
from wan.attention.exchange import HeadExchange, TokenPart
from wan.attention.head_group import CacheShape, HeadLayout, Retention
from wan.attention.rope import RotaryEmbedding, Rotation
from wan.attention.varlen import RaggedFn, ragged_backend
from wan.config import ModelConfig
from wan.geometry import LatentGeometry
from wan.transformer.layers import OutputHead, TransformerBlock
from wan.transformer.sharded import gathered


@dataclass(frozen=True)
class TimeContext:
    """What the model needs of one timestep (in thousandths of the noise schedule, 0 to 1000).

    `layers` [layers, 6, dim]: shift, 1 + scale, gate of self-attention, then of the FFN; `head` [2, dim]: shift and
    1 + scale of the output head; `modulation` [6 * dim] float32: the projected embedding that all layers share.
    Of a pass whose F frames are at different timesteps: [layers, 6, F, dim] and [2, F, dim], see `by_frame`.
    """

    timestep: float
    layers: Tensor
    head: Tensor
    modulation: Tensor

    @classmethod
    def by_frame(cls, times: Sequence[TimeContext]) -> TimeContext:
        """Of a pass whose frames are at `times`, one for each."""
        layers = torch.stack([time.layers for time in times], dim=2)
        head = torch.stack([time.head for time in times], dim=1)
        return cls(times[0].timestep, layers, head, times[0].modulation)


@dataclass(frozen=True)
class TextContext:
    """A prompt's cross-attention keys and values, one [B, text_len, H, D] each per layer."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


@dataclass
class TeaCacheResidual:
    """Output minus input of all layers in the last pass that ran them (TeaCache, arXiv 2411.19108)."""

    value: Tensor | None = None


class _LayerParts(NamedTuple):
    """What a layer does before, between and after its attentions, as it stands or compiled."""

    before: Callable[..., tuple[Tensor, Tensor, Tensor]]
    between: Callable[..., tuple[Tensor, Tensor]]
    after: Callable[..., Tensor]


_EAGER = _LayerParts(
    TransformerBlock.before_attention, TransformerBlock.between_attentions, TransformerBlock.after_attention
)


def _size(block: TransformerBlock, x: Tensor, *others: Tensor | None) -> Hashable:
    """Heads may be in an order of their own or not."""
    return x.shape, x.dtype, tuple(other is None for other in others)


class CausalWanModel(nn.Module):
    """The transformer; build it on the meta device and load weights into it, or initialise it with `random_`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.patch_size[0] == 1
        self.config = config
        self.attention: AttentionFn = sdpa
        self.ragged: RaggedFn | None = None
        self.exchange: HeadExchange | None = None
        """The other processes that make a video together with this one, if there are any."""
        self.patch_embedding = nn.Conv3d(config.in_dim, config.dim, config.patch_size, stride=config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, config.dim), nn.GELU(approximate="tanh"), nn.Linear(config.dim, config.dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, config.dim), nn.SiLU(), nn.Linear(config.dim, config.dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, 6 * config.dim))
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))
        self.head = OutputHead(config)
        self._parts = _EAGER
        self._rotary = RotaryEmbedding(config.head_dim)

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    def layers(self) -> list[TransformerBlock]:
        return [block for block in self.blocks if isinstance(block, TransformerBlock)]

    def random_(self, seed: int = 0) -> CausalWanModel:
        """Fill the weights with small random numbers; speed and memory do not depend on their values."""
        generator = torch.Generator(self.device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            with torch.no_grad():
                if ".norm" in name and name.endswith("weight"):
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(0.0, 0.02, generator=generator)
        return self.requires_grad_(False)

    def use_attention(self, name: AttentionName) -> None:
        """Attend by the backend called `name`. Raises InputError if it cannot run here; caches keep what they have."""
        self.attention = attention_backend(name, self.device, self.dtype)
        self.ragged = ragged_backend(name, self.device, self.dtype)

    def compile_layers(self, on: bool = True, backend: str = "inductor") -> None:
        """Compile what lies between the attentions, once for all layers, without graph breaks; or go back from it.

        Attention and the cache stay outside: their shapes follow from what is kept, those of the compiled parts from
        the size of a block alone, so that a growing cache, new head roles or another prompt compile nothing anew.
        Passes that re-encode earlier frames have other sizes; they run as they are.
        """
        compiled: Callable[..., Any] = partial(compiled_by_size, size=_size, backend=backend)
        self._parts = _LayerParts(*map(compiled, _EAGER)) if on else _EAGER

    def encode_time(self, timestep: float) -> TimeContext:
        """The modulations of one timestep, computed in float32 whatever the model's dtype is."""
        half = self.config.freq_dim // 2
        angles = timestep * 10000.0 ** -(torch.arange(half, dtype=torch.float64, device="cpu") / half)
        sinusoid = torch.cat((angles.cos(), angles.sin())).float().to(self.device)
        embedding = _float_sequential(self.time_embedding, sinusoid)
        modulation = _float_sequential(self.time_projection, embedding)
        learned = torch.cat([block.modulation for block in self.layers()]).float()
        layers = learned + modulation.view(1, 6, -1)
        layers[:, [1, 4]] += 1
        head = self.head.modulation.float()[0] + embedding
        head[1] += 1
        return TimeContext(timestep, layers.to(self.dtype), head.to(self.dtype), modulation)

    def encode_text(self, embeds: Tensor) -> TextContext:
        """The keys and values of a prompt; `embeds` [B, text_len, text_dim], zero past the prompt."""
        text = self.text_embedding(to_device(embeds, self.device).to(self.dtype))
        pairs = [block.cross_attn.keys_and_values(text) for block in gathered(self.layers())]
        return TextContext(tuple(k for k, _ in pairs), tuple(v for _, v in pairs))

    def new_cache(
        self,
        geometry: LatentGeometry,
        batch: int,
        retention: Retention,
        relative_window: int | None = None,
        layout: HeadLayout | None = None,
        most: int | None = None,
    ) -> KVCache:
        """An empty cache for `batch` videos of this geometry in which all heads keep `retention`, `most` as in
        `KVCache.reset`, or each what `layout` says."""
        shape = CacheShape(
            batch,
            self.config.num_heads,
            self.config.head_dim,
            geometry.tokens_per_frame,
            geometry.frames_per_block,
            geometry.num_frames - geometry.frames_per_block,
        )
        like = self.patch_embedding.weight
        return KVCache(
            self.config.num_layers,
            shape,
            retention,
            self.attention,
            like,
            relative_window,
            layout,
            self.ragged,
            most,
            self.exchange,
        )

    def forward(
        self,
        latents: Tensor,
        time: TimeContext,
        text: TextContext,
        cache: KVCache,
        start_frame: int,
        commit: bool = False,
        residual: TeaCacheResidual | None = None,
    ) -> Tensor:
        """The flow v = noise - x0 of latents [B, F, C, h, w] whose first frame is number `start_frame` of the video.

        With `commit` the pass's keys and values join the cache. `residual` receives what `skip_layers` needs.
        """
        frames = range(start_frame, start_frame + latents.shape[1]) if commit else None
        rotation = self.rotation(latents, start_frame + cache.moved)
        return self.flow(latents, time, text, cache, rotation, frames, residual)

    def commit(self, latents: Tensor, time: TimeContext, text: TextContext, cache: KVCache, start_frame: int) -> None:
        """A clean pass: like `forward` with `commit`, without what nobody uses (the head, most of the last layer)."""
        frames = range(start_frame, start_frame + latents.shape[1])
        self.encode(latents, time, text, cache, self.rotation(latents, start_frame + cache.moved), frames)

    def flow(
        self,
        latents: Tensor,
        time: TimeContext,
        text: TextContext,
        cache: KVCache,
        rotation: Rotation,
        commit: range | None = None,
        residual: TeaCacheResidual | None = None,
    ) -> Tensor:
        """`forward` with its positions given as tensors; the pass joins the cache as the frames `commit`, if any."""
        y, rotation, part = self._share(self._patchify(latents), rotation, time)
        x = y if residual is not None else None
        for layer, block in enumerate(gathered(self.layers())):
            y = self._run(block, layer, y, time, text, cache, rotation, commit, part)
        if residual is not None and x is not None:
            residual.value = y - x
        return self._outputs(y, time, latents, part)

    def encode(
        self,
        latents: Tensor,
        time: TimeContext,
        text: TextContext,
        cache: KVCache,
        rotation: Rotation,
        commit: range | None = None,
    ) -> None:
        """`commit` with its positions given as tensors; without frames to commit, a block's keys and values are left
        in the own slots of all layers, for `KVCache.append_current_block`."""
        x, rotation, part = self._share(self._patchify(latents), rotation, time)
        last = self.config.num_layers - 1
        for layer, block in enumerate(gathered(self.layers()[: last + cache.observing])):
            x = self._run(block, layer, x, time, text, cache, rotation, commit, part)
        if cache.observing:
            return
        order, modulation = cache.layers[last].head_order, time.layers[last]
        modulation = modulation if part is None else part.modulation(modulation)
        for block in gathered(self.layers()[last:]):
            k, v = block.commit_only(x, modulation, rotation, order and order.order)
        if part is not None:
            k, v = part.to_heads((k, v), cache.layers[last].head_counts)
        if commit is None:
            cache.layers[last].write(k, v)
        else:
            cache.layers[last].commit(k, v, commit)

    def rotation(self, latents: Tensor, start_frame: int) -> Rotation:
        """The rotary positions of a pass over latents [B, F, C, h, w] from frame `start_frame` on."""
        grid = latents.shape[3] // self.config.patch_size[1], latents.shape[4] // self.config.patch_size[2]
        return self._rotary.table(start_frame, latents.shape[1], grid, self.device)

    def skip_layers(self, latents: Tensor, time: TimeContext, residual: TeaCacheResidual) -> Tensor:
        """The flow if the layers add what they added in the pass that filled `residual`."""
        assert residual.value is not None
        x = self._patchify(latents)
        part = None if self.exchange is None else TokenPart(self.exchange, x.shape[1])
        return self._outputs((x if part is None else x[:, part.own]) + residual.value, time, latents, part)

    def _share(self, x: Tensor, rotation: Rotation, time: TimeContext) -> tuple[Tensor, Rotation, TokenPart | None]:
        """Of the tokens [B, L, dim] and their positions those of this process; all of them if there is no other."""
        if self.exchange is None:
            return x, rotation, None
        part = TokenPart(self.exchange, x.shape[1])
        if time.layers.dim() == 4:
            count = time.layers.shape[2]
            frames = torch.arange(count, device=x.device).repeat_interleave(x.shape[1] // count)
            part = part._replace(frames=frames[part.own])
        return x[:, part.own], Rotation(rotation.cos[part.own], rotation.sin[part.own]), part

    def _outputs(self, y: Tensor, time: TimeContext, latents: Tensor, part: TokenPart | None) -> Tensor:
        """The flow [B, F, C, h, w] from the tokens' last state."""
        out: Tensor = self.head(y, time.head if part is None else part.modulation(time.head))
        return self._unpatchify(out if part is None else part.exchange.all_tokens(out, part.tokens), latents)

    def _run(
        self,
        block: TransformerBlock,
        layer: int,
        x: Tensor,
        time: TimeContext,
        text: TextContext,
        cache: KVCache,
        rotation: Rotation,
        commit: range | None,
        part: TokenPart | None,
    ) -> Tensor:
        modulation = time.layers[layer] if part is None else part.modulation(time.layers[layer])
        parts = self._parts if x.shape[1] == cache.own_tokens else _EAGER
        order, inverse = cache.layers[layer].head_order or (None, None)
        q, k, v = parts.before(block, x, modulation, rotation.cos, rotation.sin, order)
        if part is not None:
            q, k, v = part.to_heads((q, k, v), cache.layers[layer].head_counts)
        attended = cache.layers[layer].attend(q, k, v)
        if commit is not None:
            cache.layers[layer].commit(k, v, commit)
        if part is not None:
            attended = part.exchange.to_tokens(attended, cache.layers[layer].head_counts)
        x, q = parts.between(block, x, attended, modulation, inverse)
        del k, v, attended  # a fifth of what a pass takes at its worst moment, which is yet to come
        return parts.after(block, x, self.attention(q, text.keys[layer], text.values[layer]), modulation)

    def _patchify(self, latents: Tensor) -> Tensor:
        """[B, F, C, h, w] -> tokens [B, L, dim]; a convolution with stride = kernel is a product over patches."""
        _, p, q = self.config.patch_size
        patches = rearrange(latents.to(self.dtype), "b f c (h p) (w q) -> b (f h w) (c p q)", p=p, q=q)
        return F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)

    def _unpatchify(self, x: Tensor, latents: Tensor) -> Tensor:
        """[B, L, rows * columns * C] -> float32 [B, F, C, h, w] in the sizes of `latents`."""
        _, p, q = self.config.patch_size
        f, h = latents.shape[1], latents.shape[3] // p
        return rearrange(x.float(), "b (f h w) (p q c) -> b f c (h p) (w q)", f=f, h=h, p=p, q=q)


def _float_sequential(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Run linear layers and activations in float32 whatever dtype their weights are stored in."""
    for layer in layers:
        x = F.linear(x, layer.weight.float(), layer.bias.float()) if isinstance(layer, nn.Linear) else layer(x)
    return x
