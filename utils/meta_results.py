"""What PyTorch's operators return for tensors on the meta device, found out once for operands that are alike.

There an operator has nothing to compute but the sizes of its result, most of which PyTorch does in Python, in a tenth
of a millisecond and more. A model asks for the same in every layer and every pass. This file counts no bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

REMEMBERED = 50_000  # results, of a few numbers each

_PLAIN = Tensor, Parameter  # others may do as they like
_CONSTANTS = int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format


class _Unlike(Exception):
    """What cannot be compared, or does not say all of what becomes of it."""


class _Made(NamedTuple):
    """A new tensor, alone in its memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def again(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


# A tensor, several in a list or tuple, or None: the first operand, which was written to.
_Result = tuple[type, list[_Made]] | None

_known: dict[Hashable, _Result] = {}


def tensors_in(value: object) -> Iterator[Tensor]:
    """All tensors in a nest of lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)


def result_of(operator: Callable[..., object], args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
    """`operator(*args, **kwargs)`; on the meta device a new tensor of the same layout where the operator returned a new
    one for such operands before. For `__torch_dispatch__`, which sees operators beneath all that looks at them."""
    try:
        key = _key((operator, torch.get_default_dtype(), args, *kwargs.items()))
    except _Unlike:
        return operator(*args, **kwargs)
    if key in _known:
        return _again(_known[key], args)
    result = operator(*args, **kwargs)
    try:
        made = _description(result, args, kwargs)
        unchanged = key == _key((operator, torch.get_default_dtype(), args, *kwargs.items()))
    except _Unlike:
        return result
    if unchanged:
        if len(_known) >= REMEMBERED:
            _known.clear()
        _known[key] = made
    return result


def _again(made: _Result, args: tuple[object, ...]) -> object:
    if made is None:
        return args[0]
    kind, parts = made
    return parts[0].again() if kind is Tensor else kind([part.again() for part in parts])


def _key(value: object) -> Hashable:
    """Of what decides about an operator's result: the layouts of tensors, and constants with their types."""
    kind = type(value)
    if kind in _PLAIN:
        assert isinstance(value, Tensor)
        if not value.is_meta or value.layout is not torch.strided:
            raise _Unlike
        return value.shape, value.stride(), value.dtype
    if kind in _CONSTANTS:
        return kind, value
    if kind is tuple or kind is list:
        assert isinstance(value, (tuple, list))
        return tuple([_key(part) for part in value])
    if kind is torch._ops.OpOverload:
        return value
    raise _Unlike


def _description(result: object, args: tuple[object, ...], kwargs: Mapping[str, object]) -> _Result:
    if args and result is args[0] and isinstance(result, Tensor):
        return None
    kind = type(result)
    parts = [result] if kind is Tensor else result
    if kind not in (Tensor, list, tuple):
        raise _Unlike
    assert isinstance(parts, (list, tuple))
    taken = {given.untyped_storage()._cdata for given in tensors_in((args, kwargs))}
    made = []
    for part in parts:
        if type(part) is not Tensor or not part.is_meta or part.layout is not torch.strided:
            raise _Unlike
        storage, like = part.untyped_storage(), _Made(part.shape, part.stride(), part.dtype)
        other = like.again()
        alike = part.storage_offset() == 0 and storage.nbytes() == other.untyped_storage().nbytes()
        if storage._cdata in taken or not alike or part.is_conj() or part.is_neg():  # a view, for one
            raise _Unlike
        taken.add(storage._cdata)
        made.append(like)
    return kind, made
