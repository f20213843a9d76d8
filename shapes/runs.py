"""What every training stage shares: its folder, its log, and going on after a kill.

A stage's state is written to a temporary file and renamed, so a kill at any moment leaves the last complete one.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
import pickle
import shlex
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from utils.errors import InputError
from utils.files import remove_stale_partials, write_atomic
from utils.user_paths import require_file
from wan.checkpoints.filling import require_finite

logger = logging.getLogger(__name__)

# What torch.load makes of files that torch.save has not written.
_NOT_SAVED = (
    *(RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError),
    *(struct.error, pickle.UnpicklingError),
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of weights


def training_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_precision(device: torch.device) -> AbstractContextManager[None]:
    """Products in bf16 where a CPU has them; elsewhere they would take twice the time of float32. A GPU does so small a
    model's in float32 before its next kernel is launched."""
    fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()  # type: ignore[no-untyped-call]
    return torch.autocast("cpu", torch.bfloat16) if fast else nullcontext()


def end_with_parent() -> None:
    """Let this process, which multiprocessing has started, end when its parent has, even if that was killed: who took
    over its lock would find it still writing. PyTorch sends such a process SIGINT, which `nohup` and a shell's `&` let
    it ignore."""
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def log_to_stdout() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)


@dataclass
class Stage:
    """A named stage of `steps` steps under `folder`, of which this run makes those before `until`.

    Every `every` seconds its state is saved and its losses are logged: a kill costs no more than that. `sizes` are the
    options that decide what a step is: a run goes on with those that it was begun with.
    """

    folder: Path
    name: str
    steps: int
    until: int | None = None
    every: float = 60.0
    sizes: Mapping[str, object] = field(default_factory=dict)
    _losses: list[dict[str, float]] = field(default_factory=list)
    _since: float = field(default_factory=time.monotonic)

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.pt"

    @property
    def end(self) -> int:
        """The step before which this run stops."""
        return self.steps if self.until is None else min(self.until, self.steps)

    def stored(self) -> dict[str, object] | None:
        """The saved state, or None at the beginning. Raises InputError if this run cannot go on with it."""
        if not self.path.exists():
            return None
        state = load(self.path)
        if "step" not in state:
            raise InputError(f"{self.path}: is of a finished model that --start-from has named; give another --work")
        begun = cast("Mapping[str, object]", state.get("sizes", {}))  # which older states lack
        other = [name for name, value in self.sizes.items() if begun.get(name, value) != value]
        if other:
            had = " and ".join(f"no --{name}" if begun[name] is None else f"--{name} {begun[name]}" for name in other)
            raise InputError(
                f"--{', --'.join(other)}: {self.path} was begun with {had}; go on with that, or give another --work"
            )
        return state

    def resume(self) -> dict[str, object] | None:
        """As `stored`, which the log then tells of."""
        if self.folder.is_dir():
            remove_stale_partials(self.folder)
        state = self.stored()
        if state is not None:
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
        if not all(map(math.isfinite, means.values())):
            raise InputError(
                f"{self.path}: the training has diverged before step {done} ({text}); the file is from before, and "
                "nothing goes on from it. Begin anew in another --work; dit needs another --seed too"
            )
        save({"step": done, "sizes": dict(self.sizes), **state()}, self.path)
        logger.info("%s %d/%d  %s  %.2f s a step", self.name, done, self.steps, text, pace)
        self._losses, self._since = [], time.monotonic()


def sizes_of(recipe: object) -> dict[str, object]:
    """`Stage.sizes` of a recipe."""
    return {name: getattr(recipe, name) for name in ("steps", "batch", "wide", "seed") if hasattr(recipe, name)}


def save(state: Mapping[str, object], path: Path) -> None:
    """Write what `load` reads, whole or not at all. Raises InputError if it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, serialised(state))


def serialised(state: Mapping[str, object]) -> bytes:
    """What `save` writes."""
    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()


def command_of(path: Path) -> str:
    """What makes a stage's state, and goes on with it."""
    return f"python -m shapes.train {path.stem} --work {shlex.quote(str(path.parent))}"


def load(path: Path) -> dict[str, object]:
    """What a stage has left. Raises InputError if it is missing or damaged."""
    if not path.exists():
        raise InputError(f"{path}: is missing; {command_of(path)} makes it")
    require_file(path, "", "state of a training")
    try:
        return unpickled(path)
    except ValueError as error:
        raise InputError(f"{path}: is damaged{told(error)}; delete it and make it again") from error


def unpickled(path: Path) -> dict[str, object]:
    """What `save` has written. Raises ValueError for any other content."""
    try:
        state: object = torch.load(path, map_location="cpu", weights_only=True)
    except _NOT_SAVED as error:
        # PyTorch's advice for what is no pickle is to trust it.
        reason = "" if isinstance(error, pickle.UnpicklingError) else str(error).partition("\n")[0]
        raise ValueError(reason) from error
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}")
    return state


def told(error: Exception) -> str:
    """Its text in brackets, if it has one."""
    return f" ({error})" if str(error) else ""


def unfinished(state: Mapping[str, object]) -> str | None:
    """How far a stage's state is, if steps of its run are missing."""
    sizes = cast("Mapping[str, object]", state.get("sizes", {}))
    if "step" not in state or state["step"] == sizes.get("steps", state["step"]):
        return None
    return f"has {state['step']} of {sizes['steps']} steps"


def fingerprint(module: nn.Module) -> str:
    """The same for equal weights."""
    digest = hashlib.sha256()
    for value in module.state_dict().values():
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_text(state: Mapping[str, object], path: Path, text: str) -> None:
    """Raises InputError if the state at `path` has learnt by another text encoder than that of fingerprint `text`."""
    if state.get("text", text) != text:  # which older states lack
        beside = path.with_name("text.pt")
        raise InputError(
            f"{beside}: is not the text encoder by which {path} has learnt; bring that back, or give another --work"
        )


def averaged(path: Path, module: nn.Module) -> nn.Module:
    """`module` with the averaged weights of a stage's state. Raises InputError if there is none that fits."""
    return averaged_of(load(path), path, module)


def averaged_of(state: Mapping[str, object], path: Path, module: nn.Module) -> nn.Module:
    """The same of a state that `load` has read from `path`."""
    named = dict(module.named_parameters())
    values = fitting(state.get("average"), named)
    if values is None:
        raise InputError(f"{path}: is not of the model that is trained now; give another --work")
    with torch.no_grad():
        for name, value in values.items():
            require_finite(value, name, path)
            named[name].copy_(value)
    return module.eval()


def fitting(found: object, expected: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Weights of the expected names and shapes; None if that is not what is found."""
    if not isinstance(found, Mapping) or found.keys() != expected.keys():
        return None
    return dict(found) if all(_fits(value, expected[name]) for name, value in found.items()) else None


def _fits(value: object, expected: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
        return False
    return value.dtype in DTYPES and value.shape == expected.shape
