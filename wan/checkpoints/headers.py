"""What the head of a checkpoint file says of its tensors, without reading any: of safetensors and of GGUF files.

Names, types and shapes are believed only as far as they are safe to look at: sizes are bounded, and nothing is
allocated by them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from utils.errors import InputError, shown
from wan.checkpoints.files import MOST_SAFETENSORS_HEADER, damaged

# Names of types in safetensors -> PyTorch's.
SAFETENSORS_TYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"},
    **{"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F4": "float4", "F6_E2M3": "float6_e2m3"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "F6_E3M2": "float6_e3m2"},
    **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64"},
}
GGML_TYPES = {
    **{0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K"},
    **{12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"},
    **{20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"},
    **{29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"},
}
GGUF_NUMBERS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # type -> bytes
GGUF_TEXT, GGUF_LIST = 8, 9
MOST_ENTRIES = 1_000_000  # settings, tensors, or entries of a list
MOST_TEXT = 1 << 20  # bytes


class TensorInfo(NamedTuple):
    dtype: str  # as PyTorch calls it, or GGUF's type
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    promised_bytes: int | None = None  # that the file should have, where the header tells


def safetensors_header(path: Path) -> Header:
    """The header of a safetensors file. Raises InputError if it is no such header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(MOST_SAFETENSORS_HEADER, path.stat().st_size):
            raise damaged(path, f"its header is to have {length} bytes")
        raw = file.read(length)
    try:
        content = json.loads(raw)
        metadata = content.pop("__metadata__", None) or {}
        tensors = {
            name: TensorInfo(SAFETENSORS_TYPES.get(entry["dtype"], entry["dtype"]), tuple(map(int, entry["shape"])))
            for name, entry in content.items()
        }
        end = max((int(entry["data_offsets"][1]) for entry in content.values()), default=0)
        return Header(tensors, {str(key): str(value) for key, value in metadata.items()}, 8 + length + end)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise damaged(path, f"its header makes no sense: {type(error).__name__}") from error


def gguf_header(path: Path) -> Header:
    """The header of a GGUF file (version 2 or 3). Raises InputError if it is no such header."""
    try:
        with path.open("rb") as file:
            _, version, tensor_count, setting_count = _unpack(file, "<IIQQ")
            if version not in (2, 3) or max(tensor_count, setting_count) > MOST_ENTRIES:
                raise InputError(f"{shown(path)} is a GGUF file of version {version}; 2 and 3 are known.")
            metadata = {}
            for _ in range(setting_count):
                key = _text(file)
                metadata[key] = _value(file, _unpack(file, "<I")[0])
            tensors = dict(_tensor(file) for _ in range(tensor_count))
    except (struct.error, UnicodeDecodeError, OverflowError) as error:
        raise damaged(path, f"its header makes no sense: {error}") from error
    return Header(tensors, metadata)


def _unpack(file: BinaryIO, pattern: str) -> tuple[int, ...]:
    return struct.unpack(pattern, file.read(struct.calcsize(pattern)))


def _bounded(count: int, most: int) -> int:
    if count > most:
        raise OverflowError(f"{count} is more than {most}")
    return count


def _text(file: BinaryIO) -> str:
    return file.read(_bounded(_unpack(file, "<Q")[0], MOST_TEXT)).decode("utf-8")


def _value(file: BinaryIO, kind: int) -> str:
    """A setting as text; numbers are skipped, since nobody asks for them."""
    if kind == GGUF_TEXT:
        return _text(file)
    if kind in GGUF_NUMBERS:
        file.read(GGUF_NUMBERS[kind])
        return "a number"
    if kind != GGUF_LIST:
        raise OverflowError(f"{kind} is no type of settings")
    inner, count = _unpack(file, "<IQ")
    for _ in range(_bounded(count, MOST_ENTRIES)):
        if inner == GGUF_LIST:
            raise OverflowError("a list in a list")
        _value(file, inner)
    return "a list"


def _tensor(file: BinaryIO) -> tuple[str, TensorInfo]:
    name = _text(file)
    sizes = _unpack(file, f"<{_bounded(_unpack(file, '<I')[0], 8)}Q")
    kind, _ = _unpack(file, "<IQ")
    return name, TensorInfo(GGML_TYPES.get(kind, f"type {kind}"), sizes[::-1])  # GGUF counts from the last axis
