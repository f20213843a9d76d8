"""What the benchmarks' command lines have in common. A wrong word is answered before anything is measured, and a result
is stored whole."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch

from utils.command import count
from utils.errors import InputError, quoted
from utils.files import ensure_writable, write_atomic
from utils.user_paths import user_path


def some_of(known: Collection[str]) -> Callable[[str], str]:
    """The type of an option that takes some of the names, with commas between them."""

    def checked(text: str) -> str:
        for name in text.split(","):
            if name not in known:
                raise ArgumentTypeError(f"{quoted(name)} is none of {', '.join(known)}")
        return text

    return checked


def multiple_of(unit: int) -> Callable[[str], int]:
    """The type of an option that takes a width."""

    def checked(text: str) -> int:
        number = count(text)
        if number % unit:
            raise ArgumentTypeError(f"expected a multiple of {unit}, got {quoted(text)}")
        return number

    return checked


def device_here(text: str) -> torch.device:
    """The type of an option that takes a CPU or a GPU that is here."""
    try:
        found = torch.device(text)
    except RuntimeError:
        found = torch.device("meta")
    counts = {"cpu": 1, "cuda": torch.cuda.device_count()}
    if (found.index or 0) >= counts.get(found.type, 0):
        raise ArgumentTypeError(f"{quoted(text)} is no device here; there are cpu and {counts['cuda']} of cuda")
    return found


def result_file(text: str) -> Path:
    """The type of an option that takes a file to be written in the end."""
    try:
        path = user_path(text, "a file")
        ensure_writable(path)
    except InputError as error:
        raise ArgumentTypeError(str(error)) from error
    return path


def store(content: Mapping[str, object], path: Path | None) -> None:
    """Write a result, if there is to be a file. Raises InputError."""
    if path is not None:
        write_atomic(path, json.dumps(content, indent=1) + "\n")
