"""Reading checkpoints: names to tensors, mapped into memory rather than read.

Pickles are opened with `weights_only` alone (wan/checkpoints/pickles.py), so no code from a checkpoint ever runs. This
file does not know what tensors are for, nor their names (see `wan.checkpoints.state`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from safetensors import SafetensorError
from safetensors.torch import load_file

from utils.errors import InputError, shown
from wan.checkpoints.files import (
    Container,
    TooLarge,
    container_of,
    damaged,
    download_hint,
    identify_hint,
    is_no_memory,
    missing_file,
    read_json,
    some_names,
    weights_in,
)
from wan.checkpoints.pickles import read_pickle


def read_tensors(path: Path) -> Mapping[str, object]:
    """What a checkpoint holds: names to tensors, or to containers of tensors, on the CPU and mapped into memory.

    `path` is a safetensors file or one of torch.save, under any name, an index of shards, or a folder with one of
    these. Tensors are backed by the file: do not write into them. Raises InputError with the remedy.
    """
    if path.is_dir():
        path = weights_in(path)
    if not path.is_file():
        raise missing_file(path)
    container = container_of(path)
    return _read_shards(path) if container == "JSON" else _read_file(path, container)


def _read_file(path: Path, container: Container) -> Mapping[str, object]:
    if container == "safetensors":
        return _read_safetensors(path)
    return read_pickle(path, zipped=container == "zip")


def _read_shards(index: Path) -> dict[str, object]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputError(
            f"{shown(index)} is JSON, and no index of shards: it has no 'weight_map' from tensors to file names. "
            f"{download_hint(index)}"
        )
    tensors: dict[str, object] = {}
    for shard in sorted(set(weight_map.values())):
        path = index.parent / shard
        if path.parent != index.parent:
            raise InputError(f"{shown(index)} names a shard outside its folder: {shown(shard)}.")
        if not path.is_file():
            raise missing_file(path)
        container = container_of(path)
        if container == "JSON":
            raise InputError(f"{shown(index)} names a shard that is no checkpoint but JSON: {shown(shard)}.")
        tensors.update(_read_file(path, container))
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise InputError(
            f"{shown(index)} promises tensors that its shards lack: {some_names(absent)}. {download_hint(index)}"
        )
    return tensors


def _read_safetensors(path: Path) -> dict[str, object]:
    try:
        return cast("dict[str, object]", load_file(path))
    # A type of numbers that this PyTorch lacks raises anything but SafetensorError.
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, MemoryError) as error:
        if is_no_memory(error):
            raise TooLarge(path) from error
        raise _refused_safetensors(path, f"{type(error).__name__}: {error}") from error


def _refused_safetensors(path: Path, detail: str) -> InputError:
    if "Dtype not understood" in detail or "unknown variant" in detail or "KeyError" in detail:
        return InputError(
            f"{shown(path)} holds numbers of a type that is not read here ({shown(detail, 120)}): it is quantised. "
            f"{identify_hint(path)}"
        )
    return damaged(path, detail)
