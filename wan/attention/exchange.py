"""One video on several processes: tokens are shared out for everything but self-attention, heads for that.

Each rank has an even part of a pass's tokens. Before self-attention an all-to-all brings it all tokens of its own
heads, after it another brings the results back (DeepSpeed-Ulysses, arXiv 2309.14509, with uneven parts); the cache of a
head lives on its rank alone, so that what travels depends on the pass and not on what is kept: of 4 tensors
[B, L, H, D] the part (N - 1) / N, a layer. Heads cost what they keep, and are dealt out by that.

This file knows torch.distributed, which is NCCL or gloo; it knows neither policies nor the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from wan.attention.head_group import HeadLayout, Retention

T = TypeVar("T")


@dataclass(frozen=True)
class HeadShares:
    """How the heads of every layer are dealt to ranks.

    orders[l]: all heads of layer l, rank by rank; counts[l][r]: how many of them rank r has; kept[l][i]: what head
    orders[l][i] keeps.
    """

    orders: list[list[int]]
    counts: list[list[int]]
    kept: list[list[Retention]]

    @classmethod
    def even(cls, layers: int, heads: int, ranks: int, retention: Retention) -> HeadShares:
        """Heads in the order of the weights, all of which keep the same."""
        counts = [len(share(heads, ranks, rank)) for rank in range(ranks)]
        return cls([list(range(heads))] * layers, [counts] * layers, [[retention] * heads] * layers)

    @classmethod
    def balanced(cls, layout: HeadLayout, ranks: int, cost: Callable[[Retention], float]) -> HeadShares:
        """The dearest heads first, each to the rank that has least to do so far in its layer; what ranks have keeps the
        order of the layout."""
        dealt = cls([], [], [])
        for order, segments in zip(layout.orders, layout.segments, strict=True):
            kept = [retention for count, retention in segments for _ in range(count)]
            ranks_of = longest_first([cost(one) for one in kept], ranks)
            by_rank = [[place for place, owner in enumerate(ranks_of) if owner == rank] for rank in range(ranks)]
            dealt.orders.append([order[place] for places in by_rank for place in places])
            dealt.counts.append([len(places) for places in by_rank])
            dealt.kept.append([kept[place] for places in by_rank for place in places])
        return dealt

    def heads(self, layer: int, rank: int) -> slice:
        """The places of a rank's heads in orders[layer]."""
        first = sum(self.counts[layer][:rank])
        return slice(first, first + self.counts[layer][rank])

    def segments(self, layer: int, rank: int) -> list[tuple[int, Retention]]:
        """What a rank's heads keep: (number of heads, retention), neighbours that keep the same together; after them,
        in the first layer, with no heads what none of the rank's heads in any layer keeps but others' do."""
        found: list[tuple[int, Retention]] = []
        for one in self.kept[layer][self.heads(layer, rank)]:
            if found and found[-1][1] == one:
                found[-1] = found[-1][0] + 1, one
            else:
                found.append((1, one))
        if layer == 0:
            own = {one for index, kept in enumerate(self.kept) for one in kept[self.heads(index, rank)]}
            found += [(0, one) for one in dict.fromkeys(chain.from_iterable(self.kept)) if one not in own]
        return found

    def owner(self, layer: int) -> dict[int, int]:
        """The rank of every head."""
        ranks = [rank for rank, count in enumerate(self.counts[layer]) for _ in range(count)]
        return dict(zip(self.orders[layer], ranks, strict=True))


def share(count: int, ranks: int, rank: int) -> range:
    """Which of `count` neighbouring things are the rank's."""
    return range(rank * count // ranks, (rank + 1) * count // ranks)


def own_share(count: int, exchange: HeadExchange | None) -> range:
    """Which of `count` neighbouring things are this process's."""
    return range(count) if exchange is None else share(count, exchange.ranks, exchange.rank)


def longest_first(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank of every item: longest processing time first."""
    load = [0.0] * ranks
    owners = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        rank = min(range(ranks), key=lambda rank: load[rank])
        owners[item] = rank
        load[rank] += costs[item]
    return owners


class HeadExchange:
    """The ranks that make a video together, and what travels between them."""

    def __init__(
        self,
        rank: int,
        ranks: int,
        group: dist.ProcessGroup | None = None,
        waiting: dist.ProcessGroup | None = None,
    ) -> None:
        """Of a process group that has been started, torch.distributed's default one if none is given; `waiting`: one of
        the same ranks, with gloo and patience without end, on which they wait for what comes next, `group` if none is
        given."""
        self._group = group
        self._waiting = group if waiting is None else waiting
        self.rank = rank
        self.ranks = ranks
        self.sent = 0  # bytes, since the start
        self.fault: BaseException | None = None
        """What has brought the ranks out of step, if anything has; nothing more can be done together then."""

    def from_first(self, value: T) -> T:
        """The first rank's `value`, on every rank; anything that can be pickled, tensors on the CPU."""
        values = [value]
        dist.broadcast_object_list(values, group=self._waiting, group_src=0, device=torch.device("cpu"))
        return values[0]

    def from_all(self, value: T) -> list[T]:
        """Every rank's `value`, on every rank; as `from_first`."""
        values = [value] * self.ranks
        dist.all_gather_object(values, value, group=self._waiting)
        return values

    def mesh(self, kind: str) -> DeviceMesh:
        """The ranks as torch.distributed shards weights over them, on devices of a kind ("cuda", "cpu")."""
        assert dist.group.WORLD is not None
        return DeviceMesh.from_group(self._group or dist.group.WORLD, kind)

    def own_tokens(self, tokens: int) -> slice:
        """This rank's part of a pass's tokens."""
        own = share(tokens, self.ranks, self.rank)
        return slice(own.start, own.stop)

    def to_heads(self, parts: Sequence[Tensor], counts: Sequence[int], tokens: int) -> tuple[Tensor, ...]:
        """Tensors [B, own tokens, H, D], heads rank by rank, to as many [B, tokens, own heads, D]."""
        batch, _, _, width = parts[0].shape
        sent = list(zip(*(torch.split(part, list(counts), dim=2) for part in parts), strict=True))
        shapes = [(len(parts), batch, length, counts[self.rank], width) for length in self._lengths(tokens)]
        received = self._all_to_all(sent, list(map(math.prod, shapes)))
        joined = torch.cat([part.view(shape) for part, shape in zip(received, shapes, strict=True)], dim=2)
        return joined.unbind(0)

    def to_tokens(self, attended: Tensor, counts: Sequence[int]) -> Tensor:
        """[B, tokens, own heads, D] to [B, own tokens, H, D], heads rank by rank."""
        batch, tokens, _, width = attended.shape
        lengths = self._lengths(tokens)
        shapes = [(batch, lengths[self.rank], count, width) for count in counts]
        sent = [(part,) for part in torch.split(attended, lengths, dim=1)]
        received = self._all_to_all(sent, list(map(math.prod, shapes)))
        return torch.cat([part.view(shape) for part, shape in zip(received, shapes, strict=True)], dim=2)

    def all_tokens(self, own: Tensor, tokens: int) -> Tensor:
        """[B, own tokens, C] to [B, tokens, C], on every rank."""
        batch, _, channels = own.shape
        shapes = [(batch, length, channels) for length in self._lengths(tokens)]
        received = self._all_to_all([(own,)] * self.ranks, list(map(math.prod, shapes)))
        return torch.cat([part.view(shape) for part, shape in zip(received, shapes, strict=True)], dim=1)

    def move_heads(
        self,
        layer: int,
        before: HeadShares,
        after: HeadShares,
        excerpt: Callable[[int, Retention], Tensor],
        size: Callable[[Retention], int],
    ) -> list[Tensor]:
        """What this rank's heads `after` keep, flat, in their order, from where they have been.

        `excerpt` gives what head number i of this rank has to leave, flat, for a retention; `size` its length.
        """
        owner, first = before.owner(layer), before.heads(layer, self.rank).start

        def heads(rank: int) -> list[tuple[int, Retention]]:
            place = after.heads(layer, rank)
            return list(zip(after.orders[layer][place], after.kept[layer][place], strict=True))

        sent = [
            [excerpt(head - first, kept) for head, kept in heads(rank) if owner[head] == self.rank]
            for rank in range(self.ranks)
        ]
        lengths = [[size(kept) for head, kept in heads(self.rank) if owner[head] == rank] for rank in range(self.ranks)]
        received = self._all_to_all(sent, list(map(sum, lengths)))
        by_rank = [iter(torch.split(part, sizes or [0])) for part, sizes in zip(received, lengths, strict=True)]
        return [next(by_rank[owner[head]]) for head, _ in heads(self.rank)]

    def all_heads(self, own: Tensor, heads: slice, every: int) -> Tensor:
        """[layers, own heads, ...] to [layers, H, ...], of which the rank's are at `heads`, on every rank."""
        full = own.new_zeros(own.shape[0], every, *own.shape[2:])
        full[:, heads] = own
        self._sum(full)
        return full

    def trade(self, sent: Sequence[Sequence[Tensor]], sizes: Sequence[int], like: Tensor) -> list[Tensor]:
        """Give every rank its tensors of `sent`, which may be none; from each come so many numbers, flat, of the dtype
        of `like`."""
        nothing = like.new_empty(0)
        return self._all_to_all([[nothing, *parts] for parts in sent], sizes)

    def _sum(self, full: Tensor) -> None:
        """Let every rank have the sum of all."""
        dist.all_reduce(full, group=self._group)

    def _lengths(self, tokens: int) -> list[int]:
        """How many of a pass's tokens every rank has."""
        return [len(share(tokens, self.ranks, rank)) for rank in range(self.ranks)]

    def _all_to_all(self, sent: Sequence[Sequence[Tensor]], sizes: Sequence[int]) -> list[Tensor]:
        """Give every rank its tensors of `sent`; from each come so many numbers, flat."""
        sent_sizes = [sum(part.numel() for part in parts) for parts in sent]
        every = [part for parts in sent for part in parts]
        flat = every[0].new_empty(sum(sent_sizes))
        for target, part in zip(torch.split(flat, [part.numel() for part in every]), every, strict=True):
            target.view(part.shape).copy_(part)
        self.sent += (flat.numel() - sent_sizes[self.rank]) * flat.element_size()
        received = flat.new_empty(sum(sizes))
        self._swap(received, flat, list(sizes), sent_sizes)
        return list(torch.split(received, list(sizes)))

    def _swap(self, received: Tensor, sent: Tensor, received_sizes: list[int], sent_sizes: list[int]) -> None:
        """Give every rank its part of `sent`, and take each one's into `received`."""
        dist.all_to_all_single(received, sent, received_sizes, sent_sizes, group=self._group)


class PlannedExchange(HeadExchange):
    """One rank by itself, to find out on the meta device what it takes: nothing is there that could travel."""

    def from_first(self, value: T) -> T:
        return value

    def from_all(self, value: T) -> list[T]:
        return [value] * self.ranks

    def _sum(self, full: Tensor) -> None:
        """Sums are as large as what is summed."""

    def _swap(self, received: Tensor, sent: Tensor, received_sizes: list[int], sent_sizes: list[int]) -> None:
        """Both are there, and nothing is in them."""


class TokenPart(NamedTuple):
    """Of a pass of `tokens` tokens the part that this process has; `frames` [own tokens] are their frames, where these
    are at different timesteps."""

    exchange: HeadExchange
    tokens: int
    frames: Tensor | None = None

    @property
    def own(self) -> slice:
        return self.exchange.own_tokens(self.tokens)

    def modulation(self, modulation: Tensor) -> Tensor:
        """[k, dim], or [k, F, dim] by frame to [k, own tokens, dim]."""
        return modulation if self.frames is None else modulation[:, self.frames]

    def to_heads(self, parts: Sequence[Tensor], counts: Sequence[int]) -> tuple[Tensor, ...]:
        return self.exchange.to_heads(parts, counts, self.tokens)
