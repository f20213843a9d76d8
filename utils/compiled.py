"""torch.compile without recompilation: for every size a function of its own, compiled once.

PyTorch counts the variants of a function by its code object, however often it was given to torch.compile, and refuses
to run (FailOnRecompileLimitHit) when there are more than a few. Here each size has a copy of the code, so no limit is
met, and what was compiled for one size is never compiled anew for the sake of another.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from types import FunctionType
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


def compiled_by_size(function: F, size: Callable[..., Hashable], backend: str = "inductor") -> F:
    """`function` through torch.compile, whole. `size` says of a call's arguments whether they are of one kind: calls of
    a kind must have tensors of the same shapes. `backend`: as torch.compile has it, "eager" to compile nothing."""
    assert isinstance(function, FunctionType)
    # torch.compile has CUDA graphs of its own, which know nothing of those in wan/cuda_graphs.py.
    options: dict[str, Any] = {"options": {"triton.cudagraphs": False}} if backend == "inductor" else {}
    made: dict[Hashable, Callable[..., Any]] = {}

    def call(*args: object) -> object:
        kind = size(*args)
        if kind not in made:
            own = _with_code_of_its_own(function)
            made[kind] = torch.compile(own, fullgraph=True, dynamic=False, backend=backend, **options)
        return made[kind](*args)

    return cast(F, call)


def _with_code_of_its_own(function: FunctionType) -> FunctionType:
    code, closure = function.__code__.replace(), function.__closure__
    return FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
