"""How much attention every head gives to every latent frame (arXiv 2601.20499, section 3).

An observer of a cache: it sees a pass's queries and keys layer by layer and adds up softmax probabilities by frame, in
float32 and in pieces of bounded size, so that 1080p (57,000 keys for 24,000 queries) needs no more memory than 480p.
Queries may be sampled at a fixed, even spacing; no random numbers are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PIECE_BYTES = 128 << 20  # of float32 scores at a time


class FrameAttention:
    """Collects, per layer and head, the mean attention to each visible frame over queries and batch."""

    def __init__(self, tokens_per_frame: int, query_share: float = 1.0, piece_bytes: int = PIECE_BYTES) -> None:
        assert 0 < query_share <= 1
        self._tokens = tokens_per_frame
        self._query_share = query_share
        self._piece_bytes = piece_bytes
        self._layers: dict[int, Tensor] = {}
        self.frames: list[int] = []

    def __call__(self, layer: int, q: Tensor, keys: Tensor, context: Sequence[int]) -> None:
        """q [B, L, H, D]; keys [B, S, H, D]: the pass's own frames first, then the frames numbered in `context`."""
        q = q[:, self._sample(q.shape[1]).to(q.device)]
        batch, queries, heads, width = q.shape
        mass = torch.zeros(heads, keys.shape[1] // self._tokens, device=q.device)
        per_query = heads * keys.shape[1] * 4
        for item in range(batch):
            k = keys[item].float().transpose(0, 1)  # [H, S, D]
            for piece in torch.split(q[item], max(1, self._piece_bytes // per_query)):
                scores = piece.float().transpose(0, 1) @ k.transpose(1, 2) * width**-0.5  # [H, queries, S]
                by_frame = scores.softmax(dim=-1).unflatten(-1, (-1, self._tokens)).sum(-1)
                mass += by_frame.sum(dim=1)
        self._layers[layer] = mass / (batch * queries)
        self.frames = list(context)

    def _sample(self, queries: int) -> Tensor:
        count = max(1, round(queries * self._query_share))
        return (torch.arange(count, dtype=torch.float64) + 0.5).mul(queries / count).long()

    def regions(self, sink_frames: int) -> Tensor:
        """[layers, heads, 3]: attention to the first `sink_frames` context frames, the other ones, and the block."""
        mass = torch.stack([self._layers[layer] for layer in sorted(self._layers)])
        own = mass.shape[-1] - len(self.frames)
        ages = torch.tensor(self.frames).argsort().to(mass.device) + own  # context columns, oldest frame first
        context = mass[..., ages]
        sums = context[..., :sink_frames].sum(-1), context[..., sink_frames:].sum(-1), mass[..., :own].sum(-1)
        return torch.stack(sums, dim=-1)
