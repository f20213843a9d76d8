"""What the loop hands out."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class CleanBlock:
    """Finished latents [B, n, C, h, w], float32, of the frames from `start_frame` on."""

    index: int
    start_frame: int
    latents: Tensor


@dataclass
class FlowRecord:
    """The flows of the first `limit` forwards, for comparison with other implementations.

    As long as it is not full, passes that only fill the cache compute the flow too, and with any limit the last block
    has a clean pass, neither of which anybody else needs.
    """

    limit: int
    flows: list[Tensor] = field(default_factory=list)

    @property
    def open(self) -> bool:
        return len(self.flows) < self.limit

    def add(self, flow: Tensor) -> None:
        if self.open:
            self.flows.append(flow)
