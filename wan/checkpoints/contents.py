"""What a checkpoint holds, from its header alone where the format has one: containers, names, types and shapes.

Safetensors and GGUF files have headers; PyTorch's zip files are mapped into memory, and no weight of theirs is read;
files of torch.save from before 2020 are read whole. This file does not know models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch import Tensor

from utils.errors import InputError, shown
from wan.checkpoints.files import container_of, missing_file, read_json, weights_in
from wan.checkpoints.headers import Header, TensorInfo, gguf_header, safetensors_header
from wan.checkpoints.pickles import read_pickle
from wan.checkpoints.quantisation import WEIGHT_DTYPES, is_no_weight, quantisation_of, scale_names, type_name
from wan.checkpoints.state import no_weight

GIB = 1 << 30
DEEPEST = 16  # containers in containers; optimizers' have four
READ_TYPES = frozenset(type_name(dtype) for dtype in WEIGHT_DTYPES)


@dataclass(frozen=True)
class Contents:
    """A file as it is: `tree` maps names to TensorInfo, to further mappings, or to the name of another type."""

    path: Path  # in a folder, of the file or index that was found there
    container: str  # in words
    tree: Mapping[str, object]
    faults: tuple[str, ...] = ()  # what is wrong beside names and types

    @classmethod
    def of(cls, path: Path) -> Contents:
        """Of a file, an index of shards, or a folder. Raises InputError if it is none that can be looked into."""
        if path.is_dir():
            path = weights_in(path)
        if not path.is_file():
            raise missing_file(path)
        if _is_gguf(path):
            header = gguf_header(path)
            return cls(path, f"GGUF, {_size(path)}", header.tensors)
        kind = container_of(path)
        if kind == "safetensors":
            header = safetensors_header(path)
            return cls(path, f"safetensors, {_size(path)}", header.tensors, _truncation(path, header))
        if kind == "JSON":
            return cls._of_shards(path)
        tree, faults = _tree(read_pickle(path, zipped=kind == "zip"))
        words = "PyTorch zip" if kind == "zip" else "PyTorch from before version 1.6 (read whole)"
        return cls(path, f"{words}, {_size(path)}", tree, tuple(faults))

    @classmethod
    def _of_shards(cls, index: Path) -> Contents:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise InputError(f"{shown(index)} is JSON and no index of shards: it is no checkpoint.")
        shards = sorted({str(shard) for shard in weight_map.values()})
        there = [index.parent / shard for shard in shards if (index.parent / shard).is_file()]
        parts = [cls.of(path) for path in there if container_of(path) != "JSON"]
        tree = {name: value for part in parts for name, value in part.tree.items()}
        faults = (
            [f"{len(shards) - len(there)} of {len(shards)} shards are not there"] if len(there) < len(shards) else []
        )
        faults += [fault for part in parts for fault in part.faults]
        return cls(index, f"{len(shards)} shards with their index", tree, tuple(faults))


@dataclass(frozen=True)
class Numbers:
    """The types of numbers in a group of tensors."""

    weights: tuple[str, ...]
    scales: tuple[str, ...]
    quantisation: str | None

    @classmethod
    def of(cls, tensors: Mapping[str, TensorInfo]) -> Numbers:
        names = set(scale_names(tensors).values())
        types = {name: info.dtype for name, info in tensors.items() if not is_no_weight(name)}
        weights = tuple(dtype for name, dtype in types.items() if name not in names)
        scales = tuple(dtype for name, dtype in types.items() if name in names)
        ggml = sorted({dtype for dtype in weights if dtype.isupper() and dtype[0] not in "FB"})
        found = f"GGUF {', '.join(ggml)}" if ggml else quantisation_of({name: tensors[name].dtype for name in tensors})
        return cls(weights, scales, found)

    @property
    def read_here(self) -> bool:
        return {*self.weights, *self.scales} <= READ_TYPES

    def words(self) -> str:
        counts = Counter(self.weights).most_common(4)
        return ", ".join(f"{shown(dtype, 40)} ({count} tensors)" for dtype, count in counts)


def _is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False  # container_of says why


def _size(path: Path) -> str:
    size = path.stat().st_size
    return f"{size / GIB:.2f} GiB" if size > GIB // 100 else f"{size} bytes"


def _truncation(path: Path, header: Header) -> tuple[str, ...]:
    size, promised = path.stat().st_size, header.promised_bytes
    return () if promised in (None, size) else (f"the file has {size} bytes, its header promises {promised}",)


def _tree(mapping: Mapping[str, object], depth: int = 0) -> tuple[dict[str, object], list[str]]:
    """The mapping with descriptions in place of tensors, and what is wrong with some of them."""
    tree: dict[str, object] = {}
    faults: list[str] = []
    for name, value in mapping.items():
        if isinstance(value, Mapping) and depth < DEEPEST:
            tree[str(name)], inner = _tree(cast("Mapping[str, object]", value), depth + 1)
            faults += inner
        elif isinstance(value, Tensor):
            tree[str(name)] = TensorInfo(type_name(value.dtype), () if value.is_nested else tuple(value.shape))
            fault = no_weight(value)
            if fault is not None and "numbers, which" not in fault:
                faults.append(f"tensor '{shown(name, 80)}' {fault}")
        else:
            tree[str(name)] = type(value).__name__
    return tree, faults[:5]
