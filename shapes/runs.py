"""What every training stage shares: its folder, its log, and going on after a kill.

A stage's state is written to a temporary file and renamed, so a kill at any moment leaves the last complete one.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


def training_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_precision(device: torch.device) -> AbstractContextManager[None]:
    """Products in bf16 where a CPU has them; elsewhere they would take twice the time of float32. A GPU does so small a
    model's in float32 before its next kernel is launched."""
    fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()  # type: ignore[no-untyped-call]
    return torch.autocast("cpu", torch.bfloat16) if fast else nullcontext()


def log_to_stdout() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)


@dataclass
class Stage:
    """A named stage of `steps` steps under `folder`, of which this run makes those before `until`.

    Every `every` seconds its state is saved and its losses are logged: a kill costs no more than that.
    """

    folder: Path
    name: str
    steps: int
    until: int | None = None
    every: float = 60.0
    _losses: list[dict[str, float]] = field(default_factory=list)
    _since: float = field(default_factory=time.monotonic)

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.pt"

    @property
    def end(self) -> int:
        """The step before which this run stops."""
        return self.steps if self.until is None else min(self.until, self.steps)

    def resume(self) -> dict[str, object] | None:
        """The saved state, or None at the beginning."""
        if not self.path.is_file():
            return None
        state: dict[str, object] = torch.load(self.path, map_location="cpu", weights_only=True)
        logger.info("%s: going on from step %s", self.name, state["step"])
        return state

    def due(self, step: int) -> bool:
        """Whether it is time to save, after this step (counted from 0)."""
        return step + 1 == self.end or time.monotonic() - self._since >= self.every

    def after(
        self, step: int, losses: dict[str, float], state: Callable[[], dict[str, object]], due: bool | None = None
    ) -> None:
        """To be called after every step (counted from 0). `due`: what `due` has said, if it has been asked."""
        self._losses.append(losses)
        if not (self.due(step) if due is None else due):
            return
        done = step + 1
        names = sorted({name for row in self._losses for name in row})
        values = {name: [row[name] for row in self._losses if name in row] for name in names}
        means = {name: sum(found) / len(found) for name, found in values.items()}
        pace = (time.monotonic() - self._since) / len(self._losses)
        text = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        logger.info("%s %d/%d  %s  %.2f s a step", self.name, done, self.steps, text, pace)
        self._losses, self._since = [], time.monotonic()
        save({"step": done, **state()}, self.path)


def save(state: dict[str, object], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def averaged(path: Path, module: nn.Module) -> nn.Module:
    """`module` with the averaged weights of a stage's state."""
    values = cast("dict[str, Tensor]", torch.load(path, map_location="cpu", weights_only=True)["average"])
    named = dict(module.named_parameters())
    assert named.keys() == values.keys()
    with torch.no_grad():
        for name, value in values.items():
            named[name].copy_(value)
    return module.eval()
