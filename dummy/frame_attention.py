"""How much attention every head gives to every latent frame (arXiv 2601.20499, section 3).

An observer of a cache: it sees a pass's queries and keys layer by layer and adds up softmax probabilities by frame, in
float32 and in pieces of bounded size, so that 1080p (57,000 keys for 24,000 queries) needs no more memory than 480p.
Queries may be sampled, a fixed choice that is evenly spread; no random numbers are drawn. On the small trained model
30 queries give 0.979 of the dummy set (benchmarks/results/sampling.json); a quarter of the 4,680 at 480p would be
1,170, which cost a GPU more than they tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from utils.transfer import to_device

PIECE_BYTES = 32 << 20  # of float32 scores at a time, and as much of their softmax
MOST_SAMPLED = 256  # queries: their number is what the error of sampled scores depends on, not their share
GOLDEN = 0.5 * 5**0.5 - 0.5  # of its multiples the fractional parts are as evenly spread as any


class FrameAttention:
    """Collects, per layer and head, the mean attention to each visible frame over queries and batch.

    `query_share` and `most` as in `sampled`. `with_entropy`: also the mean entropy of a query's attention over all
    keys, in nats. Of a batch the first `videos` count.
    """

    def __init__(
        self,
        tokens_per_frame: int,
        query_share: float = 1.0,
        piece_bytes: int = PIECE_BYTES,
        with_entropy: bool = False,
        most: int | None = MOST_SAMPLED,
        videos: int | None = None,
    ) -> None:
        assert 0 < query_share <= 1
        self._tokens = tokens_per_frame
        self._query_share = query_share
        self._piece_bytes = piece_bytes
        self._with_entropy = with_entropy
        self._most = most
        self._videos = videos
        self._sampled = SampledQueries(self._sample)
        self._layers: dict[int, Tensor] = {}
        self._entropies: dict[int, Tensor] = {}
        self.frames: list[int] = []

    def __call__(
        self, layer: int, q: Tensor, keys: Tensor, context: Sequence[int], values: Tensor | None = None
    ) -> None:
        """q [B, L, H, D]; keys [B, S, H, D]: the pass's own frames first, then the frames numbered in `context`; values
        are not looked at."""
        q = self._sampled.of(q[: self._videos])
        batch, queries, heads, width = q.shape
        mass = torch.zeros(heads, keys.shape[1] // self._tokens, device=q.device)
        entropy = torch.zeros(heads, device=q.device)
        per_query = heads * keys.shape[1] * 4
        for item in range(batch):
            k = keys[item].transpose(0, 1)  # [H, S, D]
            for piece in torch.split(q[item], max(1, self._piece_bytes // per_query)):
                scores = products(piece.transpose(0, 1), k).mul_(width**-0.5)  # [H, queries, S]
                shares = scores.softmax(dim=-1)
                mass += torch.unflatten(shares, -1, (-1, self._tokens)).sum(-1).sum(dim=1)
                if self._with_entropy:
                    entropy += (scores.logsumexp(-1) - shares.mul_(scores).sum(-1)).sum(dim=1)
        self._layers[layer] = mass / (batch * queries)
        self._entropies[layer] = entropy / (batch * queries)
        self.frames = list(context)

    def _sample(self, queries: int) -> Tensor:
        return evenly_spread(queries, sampled(queries, self._query_share, self._most))

    def by_frame(self) -> Tensor:
        """[layers, heads, context frames + 1]: attention to each context frame, oldest first, and to the block."""
        mass = torch.stack([self._layers[layer] for layer in sorted(self._layers)])
        own = mass.shape[-1] - len(self.frames)
        ages = torch.tensor(self.frames, dtype=torch.long, device="cpu").argsort() + own
        return torch.cat((mass[..., to_device(ages, mass.device)], mass[..., :own].sum(-1, keepdim=True)), dim=-1)

    def regions(self, sink_frames: int) -> Tensor:
        """[layers, heads, 3]: attention to the first `sink_frames` context frames, the other ones, and the block."""
        return regions(self.by_frame(), sink_frames)

    def entropy(self) -> Tensor:
        """[layers, heads], nats; at most the logarithm of the number of keys."""
        assert self._with_entropy
        return torch.stack([self._entropies[layer] for layer in sorted(self._entropies)])


class SampledQueries:
    """Some queries of every pass, always those in the same places, which are found once and kept on the device."""

    def __init__(self, places: Callable[[int], Tensor]) -> None:
        """`places`: on the host, of so many queries."""
        self._find = places
        self._known: tuple[int, Tensor] | None = None

    def of(self, q: Tensor) -> Tensor:
        """[B, L, H, D] -> [B, sampled, H, D]."""
        queries = q.shape[1]
        if self._known is None or self._known[0] != queries:
            self._known = queries, to_device(self._find(queries), q.device)
        return q[:, self._known[1]]


def evenly_spread(queries: int, count: int) -> Tensor:
    """`count` of that many queries, one in each of as many equal stretches; its place in them follows the golden ratio,
    since a constant step would meet the same few columns in every row of a frame."""
    stretch = torch.arange(count, dtype=torch.float64, device="cpu")
    return ((stretch + (0.5 + stretch * GOLDEN) % 1) * (queries / count)).long()


def sampled(queries: int, share: float, most: int | None = MOST_SAMPLED) -> int:
    """How many of `queries` are scored: all with a share of 1, otherwise at most `most` (None: no limit)."""
    count = max(1, round(queries * share))
    return count if share == 1 or most is None else min(most, count)


def products(q: Tensor, k: Tensor) -> Tensor:
    """q [H, Q, D], k [H, S, D] to float32 [H, Q, S]; half-precision inputs lose nothing, their products are exact."""
    if q.device.type != "cpu" and q.dtype != torch.float32:
        return torch.bmm(q, k.transpose(1, 2), out_dtype=torch.float32)
    return q.float() @ k.float().transpose(1, 2)


def regions(by_frame: Tensor, sink_frames: int) -> Tensor:
    """[..., context frames + 1] as `FrameAttention.by_frame` gives it to [..., 3]: sink, neighbour and current."""
    context, own = by_frame[..., :-1], by_frame[..., -1]
    return torch.stack((context[..., :sink_frames].sum(-1), context[..., sink_frames:].sum(-1), own), dim=-1)
