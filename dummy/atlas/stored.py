"""A stored atlas read with mistrust: what is missing, misshapen or no number is found before anything is made of it.

The layout is that of `Atlas` (table.py). This file checks it and works nothing out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import InputError
from utils.tensor_file import TensorFile

FILE = TensorFile("head_atlas", "an atlas", "python -m pipeline.atlas --out FILE")
SUM_ERROR = 1e-2  # of a head's shares, which sum to 1 in float32


def read_about(path: Path) -> dict[str, Any]:
    """What the file says of itself; `frames`, `passes` and `videos` have the right form. Raises InputError."""
    about = FILE.read_about(path, f"{path}")
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
    about = read_about(path)
    tensors = FILE.read_tensors(path, f"{path}")
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


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _broken(path: Path, what: str) -> InputError:
    return FILE.broken(f"{path}", what)
