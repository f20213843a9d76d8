"""What the first of several processes that make videos together tells the others, and that all do it in one order.

Sessions of one pipeline take turns, whichever threads they are driven from: what is told and what is done with it
happen together, under the pipeline's lock, so that the collectives of all processes come in the order of the turns.
Where a turn fails, the processes are out of step, and there is none after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from wan.attention.exchange import HeadExchange
from wan.geometry import LatentGeometry

Prompt = str | tuple[str, ...]
"""One for all videos of a session, or one for each."""


class Due(NamedTuple):
    """A prompt that takes effect with a block; `embeds` [length, text_dim] of every video, on the CPU."""

    prompt: Prompt
    embeds: Sequence[Tensor]
    cut: bool


class Opening(NamedTuple):
    """A session, as the processes that follow must know it."""

    number: int
    seeds: Sequence[int]
    geometry: LatentGeometry
    prefix_latents: Tensor | None
    overrides: tuple[str, ...]
    live: bool
    keep_buffers: bool


class Turn(NamedTuple):
    """A session's next block, with the prompt that takes effect with it, or its end."""

    number: int
    due: Due | None = None
    ended: bool = False


class Turns:
    """The turns of a pipeline. A process that follows takes them as they come, and one that is alone tells nobody."""

    def __init__(self, exchange: HeadExchange | None) -> None:
        self._exchange = exchange if exchange is not None and exchange.rank == 0 else None

    @contextmanager
    def taken(self, turn: Opening | Turn) -> Iterator[None]:
        """Let the others do what this process does within the context. Raises what has brought them out of step, if
        anything has."""
        exchange = self._exchange
        if exchange is None:
            yield
            return
        if exchange.fault is not None:
            raise exchange.fault
        try:
            exchange.from_first(turn)
            yield
        except BaseException as error:
            exchange.fault = exchange.fault or error
            raise

    def end(self, turn: Turn | None) -> None:
        """Let the others, if they are in step, end a session, or, with None, all."""
        if self._exchange is not None and self._exchange.fault is None:
            try:
                self._exchange.from_first(turn)
            except RuntimeError as error:  # it is the end in any case
                self._exchange.fault = self._exchange.fault or error
