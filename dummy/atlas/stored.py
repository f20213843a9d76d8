"""A stored atlas read with mistrust: what is missing, misshapen or no number is found before anything is made of it.

The layout is that of `Atlas` (table.py). This file checks it and works nothing out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import InputError

KEY = "head_atlas"  # of the metadata
SUM_ERROR = 1e-2  # of a head's shares, which sum to 1 in float32


def read_about(path: Path) -> dict[str, Any]:
    """What the file says of itself; `frames`, `passes` and `videos` have the right form. Raises InputError."""
    from safetensors import safe_open

    with _readable(path), safe_open(path, framework="pt") as file:
        content = (file.metadata() or {}).get(KEY)
    if content is None:
        raise InputError(f"{path}: is no head atlas; make one with python -m pipeline.atlas --out FILE")
    try:
        about: object = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its metadata is no JSON ({error})") from error
    if not isinstance(about, dict):
        raise _broken(path, f"its metadata is a {type(about).__name__}, not an object")
    for name in ("passes", "videos"):
        if not _is_list_of(about.get(name), str) or not about[name]:
            raise _broken(path, f"{name} is no list of texts")
    frames = about.get("frames")
    if not isinstance(frames, dict) or not frames:
        raise _broken(path, "frames is no table of blocks")
    for block, numbers in frames.items():
        if (
            not block.isdecimal()
            or str(int(block)) != block
            or not _is_list_of(numbers, int)
            or numbers != sorted(set(numbers))
        ):
            raise _broken(path, f"frames of block {block!r} are no ascending numbers: {numbers!r}")
    share = about.get("query_share", 1)
    if type(share) not in (int, float) or not 0 < share <= 1:
        raise _broken(path, f"query_share is {share!r}, no number above 0 and at most 1")
    return about


def read_atlas(path: Path, block_frames: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """As `read_about`, with the tensors `attention.B` and `entropy.B` of every block B. Raises InputError."""
    from safetensors import safe_open

    about = read_about(path)
    with _readable(path), safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    sizes = set()
    for block, frames in about["frames"].items():
        if not frames or frames[0] < 0 or frames[-1] >= int(block) * block_frames:
            raise _broken(path, f"block {block} cannot have seen frames {frames} before it")
        sizes.add(_check_block(path, block, about, tensors))
    if len(sizes) > 1:
        raise _broken(path, f"blocks are of models with different layers and heads: {sorted(sizes)}")
    return about, tensors


def _check_block(path: Path, block: str, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Layers and heads of a block's tensors. Raises InputError if they do not fit the metadata or hold no shares."""
    for name in (f"attention.{block}", f"entropy.{block}"):
        if name not in tensors:
            raise _broken(path, f"tensor {name} is missing")
        if not tensors[name].is_floating_point() or not bool(torch.isfinite(tensors[name]).all()):
            raise _broken(path, f"tensor {name} holds what is no number")
    attention, entropy = tensors[f"attention.{block}"], tensors[f"entropy.{block}"]
    videos, passes, width = len(about["videos"]), len(about["passes"]), len(about["frames"][block]) + 1
    if entropy.dim() != 4 or tuple(entropy.shape[:2]) != (videos, passes) or not entropy.numel():
        raise _broken(
            path, f"tensor entropy.{block} is {list(entropy.shape)}, expected [{videos}, {passes}, layers, heads]"
        )
    expected = [*entropy.shape, width]
    if list(attention.shape) != expected:
        raise _broken(path, f"tensor attention.{block} is {list(attention.shape)}, expected {expected}")
    if bool((attention < 0).any()) or float((attention.double().sum(-1) - 1).abs().max()) > SUM_ERROR:
        raise _broken(path, f"tensor attention.{block} holds no shares that sum to 1")
    return entropy.shape[2], entropy.shape[3]


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as an atlas ({error}); make one with --out") from error


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _broken(path: Path, what: str) -> InputError:
    return InputError(f"{path}: is a broken atlas: {what}; record it again with python -m pipeline.atlas --out FILE")
