"""CUDA graphs on a CPU, for tests: operators are recorded with their tensors and repeated on the same ones.

As with a CUDA graph no Python of the recorded function runs again, sizes and numbers are those of the recording, and
whatever the function read is read again from the tensor that it was then, whether or not that is the right one now.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Step = tuple[Callable[..., object], tuple[object, ...], dict[str, object], list[Tensor]]


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = _tensors(result)
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        if any(t.untyped_storage().data_ptr() in given for t in made):
            made = []  # what it leads to is there already
        if made or func._schema.is_mutable:  # else a view
            self.steps.append((func, args, kwargs, made))
        return result


def _tensors(result: object) -> list[Tensor]:
    """Of an operator's result."""
    several = result if isinstance(result, (list, tuple)) else (result,)
    return [one for one in several if isinstance(one, Tensor)]


class OperatorRecorder:
    """A `wan.transformer.graphs.Recorder`."""

    def __init__(self) -> None:
        self.replays = 0

    def warm_up(self, function: Callable[[], None]) -> None:
        function()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        with _Operators() as seen:
            function()
        spoil(seen.steps)
        return lambda: self._replay(seen.steps)

    @torch.inference_mode()
    def _replay(self, steps: list[Step]) -> None:
        self.replays += 1
        for func, args, kwargs, made in steps:
            result = func(*args, **kwargs)
            for old, new in zip(made, _tensors(result), strict=False):
                old.copy_(new)


def spoil(steps: list[Step]) -> None:
    """Recording computes nothing on a GPU: nothing that it seems to have computed may be of use."""
    for _, _, _, made in steps:
        for tensor in made:
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
