"""Checkpoint files: finding them, telling what they are, and saying what is wrong in the words of who has to mend it.

What a file is, is read off its content; its name and suffix count for nothing. This file reads JSON and a few bytes of
everything else (`wan.checkpoints.reading` reads the tensors).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from utils.errors import InputError, shown
from wan.checkpoints.published import REPOSITORIES, config_files, download_name, published_as

Container = Literal["safetensors", "zip", "legacy pickle", "JSON"]

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # in a folder, before any other name
INDEX_SUFFIX = ".safetensors.index.json"
INDEX_SUFFIXES = (INDEX_SUFFIX, ".bin.index.json")
HEAD_BYTES = 512
MOST_SAFETENSORS_HEADER = 100_000_000  # bytes; the limit of the safetensors library
MOST_JSON = 64 << 20  # bytes; the index of a 14B model has 0.1 MB, a tokenizer of 256,000 tokens 17 MB
NAMES_SHOWN = 5
NAME_LIMIT = 80  # characters of a tensor's name in a message

# What the first bytes of other formats say.
OTHER_FORMATS = {
    b"GGUF": "a GGUF file (llama.cpp's quantised format), which is not read here; take one in safetensors",
    b"\x89HDF": "an HDF5 file, not a checkpoint of PyTorch",
    b"\x93NUMPY": "a NumPy array, not a checkpoint of PyTorch",
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"7z\xbc\xaf": "a 7-Zip archive; unpack it",
    b"Rar!": "a RAR archive; unpack it",
    b"\xfd7zXZ": "an xz archive; unpack it",
    b"BZh": "a bzip2 archive; unpack it",
    b"(\xb5/\xfd": "a zstd archive; unpack it",
}


def some_names(names: Iterable[object]) -> str:
    """The first few names of many, for a message."""
    listed = list(names)
    few = ", ".join(shown(name, NAME_LIMIT) for name in listed[:NAMES_SHOWN])
    return few if len(listed) <= NAMES_SHOWN else f"{few}, ... ({len(listed)} in all)"


def identify_hint(path: Path) -> str:
    """What sends the user of a file that does not fit to what says what it is, and to the settings that fit it."""
    known = published_as(path)
    fits = f" By its name it is {' or '.join(spec.name for spec in known)}, for {config_files(known)}." if known else ""
    return f"What the file is, `python -m wan.checkpoints.identify {shown(path)}` says.{fits}"


# --------------------------------------------------------------------------------------------------------------------
# What is missing


def download_hint(path: Path) -> str:
    """How to get `path`: the `hfd.sh` line when a folder name in it is that of a known repository, else ''."""
    parts = path.parts
    for i in range(len(parts) - 1, -1, -1):
        repository = REPOSITORIES.get(parts[i])
        if repository is not None:
            root = str(Path(*parts[:i])) if i > 0 else ""
            wanted = download_name(repository, "/".join(parts[i + 1 :]))
            return f"It comes from {repository}; to get it, run:\nbash hfd.sh {wanted} {shown(root)}".rstrip()
    return "Check the path; the folders that `bash hfd.sh --help` lists go under the model root."


def relative_hint(*paths: Path) -> str:
    """Where relative paths start from, if one of `paths` is relative, else ''. Begins with a space."""
    return "" if all(path.is_absolute() for path in paths) else f" Relative paths start from {shown(Path.cwd())}."


def missing_file(path: Path) -> InputError:
    """The error for a checkpoint file that is not there, or no file."""
    if path.exists():
        return InputError(f"{shown(path)} is neither a file nor a folder. Check the path.")
    return InputError(f"{shown(path)} does not exist.{relative_hint(path)} {download_hint(path)}")


def unreadable(path: Path, error: OSError) -> InputError:
    """The error for a file that the system does not let us read."""
    return InputError(f"{shown(path)} cannot be read ({error.strerror or error}). Check the path and its permissions.")


def damaged(path: Path, detail: str) -> InputError:
    """The error for a file of a known format that ends early or makes no sense."""
    return InputError(
        f"{shown(path)} is truncated or damaged ({path.stat().st_size} bytes; {shown(detail)}). "
        f"Delete it and download it again. {download_hint(path)}"
    )


class TooLarge(InputError):
    """A file that the system does not map into memory, since it has too little."""

    def __init__(self, path: Path) -> None:
        size = f"{path.stat().st_size / (1 << 30):.1f} GiB"
        super().__init__(f"{shown(path)} ({size}) is not mapped into memory: the system says that it has too little.")


def is_no_memory(error: BaseException) -> bool:
    """Whether an error of a library means that the system has too little memory."""
    return isinstance(error, MemoryError) or "Cannot allocate memory" in str(error)


# --------------------------------------------------------------------------------------------------------------------
# What a file is


def container_of(path: Path) -> Container:
    """The format of a file that is there, by its first bytes. Raises InputError for anything that is not read here."""
    head = _head(path)
    _refuse_wrong_content(head, path)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MOST_SAFETENSORS_HEADER:
        return "safetensors"
    if head.startswith(b"PK"):
        return "zip"
    if head.startswith(b"\x80"):
        return "legacy pickle"
    if head.lstrip().startswith(b"{"):
        return "JSON"
    if not head.strip(b"\0"):
        raise damaged(path, "it begins with zeros: a download that has not finished")
    raise InputError(
        f"{shown(path)} is no checkpoint: neither a safetensors file nor one that torch.save wrote, whatever its name; "
        f"it begins with {head[:12]!r}. {download_hint(path)}"
    )


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except OSError as error:
        raise unreadable(path, error) from error


def _refuse_wrong_content(head: bytes, path: Path) -> None:
    text, name = head.lstrip().lower(), shown(path)
    if not head:
        raise InputError(f"{name} is empty (0 bytes). Delete it and download it again. {download_hint(path)}")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(
            f"{name} is a Git LFS pointer, not the weights: the repository was cloned without its large files. "
            f"Run `git lfs pull` there, or download it. {download_hint(path)}"
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise InputError(
            f"{name} is a web page (HTML), not a checkpoint: the download was answered with an error or a login page. "
            f"Delete it and download it again. {download_hint(path)}"
        )
    other = next((what for magic, what in OTHER_FORMATS.items() if head.startswith(magic)), None)
    if head[257:262] == b"ustar":
        other = "a tar archive; unpack it (if torch.save wrote it before 2018, save it again with today's PyTorch)"
    if other is not None:
        raise InputError(f"{name} is {other}.")


# --------------------------------------------------------------------------------------------------------------------
# JSON, and what is in a folder


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file. Raises InputError when it is missing, too large, or not a JSON object."""
    if not path.is_file():
        raise missing_file(path)
    _refuse_wrong_content(_head(path), path)
    require_size(path, MOST_JSON)
    name = shown(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(path, error) from error
    except RecursionError:
        raise InputError(f"{name} is nested too deeply to be read. {download_hint(path)}") from None
    except ValueError as error:
        raise InputError(f"{name} is not valid JSON ({shown(error)}). {download_hint(path)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{name} holds a JSON {type(content).__name__}, not an object. {download_hint(path)}")
    return content


def require_size(path: Path, most: int) -> None:
    """Raises InputError if the file has more than `most` bytes, before anything reads it."""
    size = path.stat().st_size
    if size > most:
        raise InputError(f"{shown(path)} has {size} bytes; no file of its kind has more than {most}. Check what it is.")


def weights_in(folder: Path) -> Path:
    """The checkpoint in a folder: an index of shards or a file, under its usual names before any other.

    Raises InputError where there is none, or several of which none has a usual name.
    """
    usual, names = usual_weights(folder), names_in(folder)
    if usual is not None:
        return usual
    files = [name for name in names if name.endswith((*SUFFIXES, *INDEX_SUFFIXES))]
    indices = [name for name in files if name.endswith(INDEX_SUFFIXES)]
    shard = next((name for name in files if "-of-0" in name), None)
    if shard is not None and not indices:
        raise missing_file(folder / f"{shard.rpartition('-of-')[0].rpartition('-')[0]}{INDEX_SUFFIX}")
    if 1 in (len(files), len(indices)):
        return folder / (indices or files)[0]
    raise _no_choice(folder, names, files)


def usual_weights(folder: Path) -> Path | None:
    """The file or index in a folder that has one of the names under which Diffusers and Transformers save weights."""
    names = set(names_in(folder))
    endings = (INDEX_SUFFIX, SUFFIXES[0], *INDEX_SUFFIXES[1:], *SUFFIXES[1:])
    return next((folder / f"{stem}{end}" for stem in STEMS for end in endings if f"{stem}{end}" in names), None)


def names_in(folder: Path) -> list[str]:
    """The names in a folder, in order. Raises InputError."""
    if not folder.is_dir():
        raise missing_file(folder)
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise unreadable(folder, error) from error


def _no_choice(folder: Path, names: list[str], files: list[str]) -> InputError:
    inside = f"Name one of its files: {some_names(files)}." if files else "It holds no checkpoint file."
    if any(name.endswith(".distcp") for name in names):
        inside = (
            "It is a distributed checkpoint; `python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER "
            "model.pt` makes a file of it."
        )
    wanted = f"{STEMS[0]}.safetensors or another file of a usual name"
    return InputError(f"{shown(folder)} is a folder without {wanted}. {inside} {download_hint(folder)}")
