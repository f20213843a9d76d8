"""What decoding a video takes in memory, found out on the meta device: nothing is computed or loaded.

It counts tensors; what the allocator rounds up and cuDNN's workspaces come on top.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import update_wrapper
from typing import Concatenate, ParamSpec

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from utils.memory import PeakTracker
from wan.attention.exchange import PlannedExchange
from wan.vae.streaming import LatentDecoder

REMEMBERED = 256  # predictions, of a few numbers each

How = ParamSpec("How")


@dataclass(frozen=True)
class DecodeBytes:
    """Bytes of a decoder: the feature cache between calls, wherever it lies, and what comes on top of it at the worst
    moment of one."""

    cache: int
    activations: int
    first: int = 0  # as `activations`, of the call that begins a video, with a single latent frame

    @property
    def total(self) -> int:
        """Most bytes at once in all places, without the weights."""
        return self.cache + self.activations


def _remembered(
    predict: Callable[Concatenate[LatentDecoder, How], DecodeBytes],
) -> Callable[Concatenate[LatentDecoder, How], DecodeBytes]:
    """`predict`, once for decoders of the same class whose weights have the same shapes and lie in memory in the same
    way: it runs thousands of layers in Python, and a run asks for the same again where it plans, checks and reports."""
    known: dict[Hashable, DecodeBytes] = {}

    def remembered(vae: LatentDecoder, /, *args: How.args, **kwargs: How.kwargs) -> DecodeBytes:
        weights = tuple((name, w.dtype, w.shape, w.stride()) for name, w in vae.module.named_parameters())
        key = type(vae), vae.frame_chunk, weights, args, tuple(sorted(kwargs.items()))
        if key not in known:
            if len(known) >= REMEMBERED:
                known.pop(next(iter(known)))
            known[key] = predict(vae, *args, **kwargs)
        return known[key]

    update_wrapper(remembered, predict)
    return remembered


@_remembered
def decode_bytes(
    vae: LatentDecoder,
    height: int,
    width: int,
    tile: int | None = None,
    block: int = 3,
    frames_per_call: int = 1,
    batch: int = 1,
    frame_chunk: int | None = None,
    on_host: bool = False,
    share: tuple[int, int] | None = None,
) -> DecodeBytes:
    """What `vae`, on the meta device, takes to decode blocks of `block` latent frames of height x width pixels,
    `batch` videos at once.

    `tile`, `frames_per_call`, `frame_chunk` and `on_host` as in LatentDecoder.decoder. The block's video counts, as the
    activations do; weights do not. `share`: (rank, ranks) of a process, where tiles are dealt to several.
    """
    assert vae.device.type == "meta", "memory is predicted with `published`, or with weights that are loaded to meta"
    vae.exchange = None if share is None else PlannedExchange(*share)
    decoder = vae.decoder(frames_per_call, tile, frame_chunk, on_host)
    shape = (batch, block, vae.z_dim, height // vae.spatial_scale, width // vae.spatial_scale)
    latents = torch.empty(shape, device="meta")
    with PeakTracker() as tracker, _FusedAttention():
        # The first two frames of a video fill the cache, the next ones are the steady case. All inside: a cache that
        # was filled outside would not count when it is dropped, and so the one that takes its place would twice.
        decoder.decode(latents[:, :1])
        first = tracker.peak - tracker.current
        decoder.decode(latents[:, :1])
        # Of a block's calls, which are alike, one is enough, beside what the others are given and give.
        call = min(frames_per_call, block)
        rest = (batch, (block - call) * vae.temporal_scale, 3, height, width)
        others = torch.empty_like(latents[:, call:], dtype=vae.dtype), torch.empty(rest, dtype=vae.dtype, device="meta")
        decoder.decode(latents[:, :call])
        del others
    # What is left is the cache; where tiles are alike, a part of it, see TiledFrames.
    return DecodeBytes(cache=decoder.cache_bytes(), activations=tracker.peak - tracker.current, first=first)


class _FusedAttention(TorchFunctionMode):
    """Attention as fused kernels do it: nothing but the result is allocated. On meta PyTorch would make the scores."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if func is scaled_dot_product_attention:
            query = args[0]
            assert isinstance(query, Tensor)
            return torch.empty_like(query)
        return func(*args, **(kwargs or {}))
