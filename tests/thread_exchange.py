"""Ranks that are threads of one process: what they send each other goes over a board, as it would over a network."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from wan.attention.exchange import HeadExchange

T = TypeVar("T")
V = TypeVar("V")
PATIENCE_S = 60.0  # of a collective; sessions may wait longer for their user


class ThreadExchange(HeadExchange):
    def __init__(self, rank: int, ranks: int, board: list[list[Tensor]], barrier: threading.Barrier) -> None:
        super().__init__(rank, ranks)
        self._board, self._barrier = board, barrier

    def _post(self, tensors: list[V]) -> list[list[V]]:
        self._board[self.rank] = tensors
        self._barrier.wait(PATIENCE_S)
        everything = list(self._board)
        self._barrier.wait(PATIENCE_S)
        return everything

    def part(self) -> None:
        """Let no rank hear of another any more."""
        self._barrier.abort()

    def from_first(self, value: V) -> V:
        (first, *_), *_ = self._post([value])
        return copy.deepcopy(first)

    def from_all(self, value: V) -> list[V]:
        return [copy.deepcopy(values[0]) for values in self._post([value])]

    def _sum(self, full: Tensor) -> None:
        full.copy_(torch.stack([tensors[0] for tensors in self._post([full.clone()])]).sum(0))

    def _swap(self, received: Tensor, sent: Tensor, received_sizes: list[int], sent_sizes: list[int]) -> None:
        """Takes no more memory than a network would."""
        self._board[self.rank] = list(torch.split(sent, sent_sizes))
        self._barrier.wait(PATIENCE_S)
        for target, parts in zip(torch.split(received, received_sizes), self._board, strict=True):
            target.copy_(parts[self.rank])
        del parts  # what is another rank's is gone when that one lets go of it
        self._barrier.wait(PATIENCE_S)
        self._board[self.rank] = []


def together(ranks: int, work: Callable[[ThreadExchange], T]) -> list[T]:
    """What `work` gives for each of so many ranks."""
    board, barrier = [[] for _ in range(ranks)], threading.Barrier(ranks)

    def one(rank: int) -> T:
        try:
            return work(ThreadExchange(rank, ranks, board, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(one, range(ranks)))
