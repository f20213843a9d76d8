"""Files that torch.save wrote, opened with `weights_only` alone: no code in them ever runs.

PyTorch answers a file that needs code with the advice to allow it. Here the reason alone is passed on.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from pathlib import Path

import torch

from utils.errors import InputError, shown
from wan.checkpoints.files import TooLarge, damaged, download_hint, is_no_memory

SAVE_AGAIN = (
    "If you trust its source, load it where it was made and save the tensors alone, for example with "
    "safetensors.torch.save_file."
)
PROTOCOL_4 = range(140, 152)  # opcodes that came with it


def read_pickle(path: Path, zipped: bool) -> dict[str, object]:
    """The mapping in a file of torch.save; mapped into memory if `zipped`, its format since PyTorch 1.6.

    Raises InputError: it is damaged, needs code, or holds no mapping.
    """
    if zipped:
        _check_zip(path)
    # PyTorch takes a file of this name for what its name says, and maps none into memory that it does not open itself.
    misnamed = path.name.endswith(".safetensors")
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")  # old storages, sparse and quantised tensors: what matters is told later
            content = torch.load(
                file if misnamed else path, weights_only=True, mmap=zipped and not misnamed, map_location="cpu"
            )
    except pickle.UnpicklingError as error:
        raise _refused(path, error) from error
    except Exception as error:  # a damaged pickle raises nearly anything: KeyError, IndexError, EOFError, ...
        if is_no_memory(error):
            raise TooLarge(path) from error
        raise damaged(path, _without_advice(error)) from error
    if not isinstance(content, dict):
        raise InputError(f"{shown(path)} holds a {type(content).__name__}, not a mapping of names to tensors.")
    return {str(name): value for name, value in content.items()}


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        raise damaged(path, "its zip directory, which stands at the end, is missing") from None
    except Exception as error:  # a directory that is there and makes no sense
        raise damaged(path, f"its zip directory cannot be read: {error}") from error
    if any(name.endswith("/constants.pkl") for name in names):
        raise InputError(f"{shown(path)} is a TorchScript program, not a file of weights. {SAVE_AGAIN}")
    if not any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        inside = ", ".join(shown(name, 60) for name in names[:3]) or "nothing"
        raise InputError(f"{shown(path)} is a zip archive, not a file of torch.save; unpack it. It holds {inside}.")


def _refused(path: Path, error: pickle.UnpicklingError) -> InputError:
    reason = str(error.__context__ or error)  # PyTorch wraps the reason in its advice
    needed = re.search(r"GLOBAL ([\w.]+)|(?:class|function) ([\w.]+)|got <class '([\w.]+)'>", reason)
    operand = re.search(r"Unsupported operand (\d+)", reason)
    if operand is not None and int(operand[1]) in PROTOCOL_4:
        return InputError(
            f"{shown(path)} was written with pickle protocol 4 or later, which PyTorch opens only by running code from "
            f"it. {SAVE_AGAIN} {download_hint(path)}"
        )
    if needed is None:
        return damaged(path, _without_advice(error.__context__ or error))
    name = next(group for group in needed.groups() if group)
    return InputError(
        f"{shown(path)} is a pickle that needs code to be opened ({shown(name)}), which this program never runs "
        f"from a checkpoint. {SAVE_AGAIN}"
    )


def _without_advice(error: BaseException) -> str:
    """Type and first line of an error; the type alone where the line is PyTorch's advice to allow code."""
    line = next(iter(str(error).splitlines()), "")
    return type(error).__name__ if "eights" in line else f"{type(error).__name__}: {line}"
