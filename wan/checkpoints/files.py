"""Checkpoint files: reading them, finding the generator in them, filling a module from them.

A file is mapped into memory rather than read, and pickles are opened with `weights_only` alone, so no code from a
checkpoint ever runs. What is wrong with a file (missing, half downloaded, a Git LFS pointer, a web page) is said in the
words of the person who has to mend it. This file knows containers, wrapper prefixes and strict loading; it does not
know what the layers are for, nor any layout of names but the one it is given (see `wan.checkpoints.diffusers_layout`
and `wan.checkpoints.lora`).
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from utils.errors import InputError

logger = logging.getLogger(__name__)

REPOSITORIES = {
    "Wan2.1-T2V-1.3B": "Wan-AI/Wan2.1-T2V-1.3B",
    "Wan2.1-T2V-14B": "Wan-AI/Wan2.1-T2V-14B",
    "Self-Forcing": "gdhe17/Self-Forcing",
    "LongLive-1.3B": "Efficient-Large-Model/LongLive-1.3B",
    "Causal-Forcing": "zhuhz22/Causal-Forcing",
}
CONTAINERS = ("generator_ema", "generator", "model", "state_dict")
LEADING_WRAPPERS = ("model.diffusion_model.", "model.", "module.", "_orig_mod.")
INNER_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
INDEX_SUFFIX = ".safetensors.index.json"
PICKLE_SUFFIXES = (".pt", ".pth")
NAMES_SHOWN = 5


# --------------------------------------------------------------------------------------------------------------------
# Reading files


def download_hint(path: Path) -> str:
    """How to get `path`: the `hfd.sh` line when a folder name in it is that of a known repository, else ''."""
    parts = path.parts
    for i in range(len(parts) - 1, -1, -1):
        repository = REPOSITORIES.get(parts[i])
        if repository is not None:
            root = str(Path(*parts[:i])) if i > 0 else ""
            return f"It comes from {repository}; to get it, run:\nbash hfd.sh {repository} {root}".rstrip()
    return "Check the path; the folders that `bash hfd.sh --help` lists go under the model root."


def missing_file(path: Path) -> InputError:
    """The error for a checkpoint file that is not there."""
    return InputError(f"{path} does not exist. {download_hint(path)}")


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file. Raises InputError when it is missing or is not a JSON object."""
    if not path.is_file():
        raise missing_file(path)
    _refuse_wrong_content(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}). {download_hint(path)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a JSON {type(content).__name__}, not an object. {download_hint(path)}")
    return content


def read_tensors(path: Path) -> Mapping[str, object]:
    """What a checkpoint holds: names to tensors, or to containers of tensors, on the CPU and mapped into memory.

    `path` is a .safetensors, .pt or .pth file, an index of shards (`*.safetensors.index.json`), or a folder with such
    an index. Tensors are backed by the file: do not write into them. Raises InputError with the remedy.
    """
    if path.is_dir():
        return _read_shards(_index_in(path))
    if not path.is_file():
        raise missing_file(path)
    if path.name.endswith(INDEX_SUFFIX):
        return _read_shards(path)
    _refuse_wrong_content(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in PICKLE_SUFFIXES:
        return _read_pickle(path)
    raise InputError(f"{path}: checkpoints end in .safetensors, .pt or .pth, not in {path.suffix or 'no suffix'!r}.")


def _index_in(folder: Path) -> Path:
    indices = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if len(indices) == 1:
        return indices[0]
    files = [p.name for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", *PICKLE_SUFFIXES)]
    inside = f"Name one of its files: {', '.join(files[:NAMES_SHOWN])}." if files else "It holds no checkpoint file."
    raise InputError(f"{folder} is a folder, and a checkpoint file is wanted. {inside}")


def _read_shards(index: Path) -> dict[str, object]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{index} has no 'weight_map'. {download_hint(index)}")
    tensors: dict[str, object] = {}
    for shard in sorted(set(weight_map.values())):
        tensors.update(read_tensors(index.parent / shard))
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise InputError(f"{index} promises tensors that its shards lack: {some_names(absent)}. {download_hint(index)}")
    return tensors


def _refuse_wrong_content(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(512)
    text = head.lstrip().lower()
    if not head:
        raise InputError(f"{path} is empty (0 bytes). Delete it and download it again. {download_hint(path)}")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(
            f"{path} is a Git LFS pointer, not the weights: the repository was cloned without its large files. "
            f"Run `git lfs pull` there, or download it. {download_hint(path)}"
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise InputError(
            f"{path} is a web page (HTML), not a checkpoint: the download was answered with an error or a login page. "
            f"Delete it and download it again. {download_hint(path)}"
        )


def _damaged(path: Path, detail: str) -> InputError:
    return InputError(
        f"{path} is truncated or damaged ({path.stat().st_size} bytes; {detail}). "
        f"Delete it and download it again. {download_hint(path)}"
    )


def _read_safetensors(path: Path) -> dict[str, object]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return cast("dict[str, object]", load_file(path))
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error


def _read_pickle(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        head = file.read(4)
    is_zip = head.startswith(b"PK")
    if is_zip and not zipfile.is_zipfile(path):
        raise _damaged(path, "its zip directory, which stands at the end, is missing")
    if not is_zip and not head.startswith(b"\x80"):
        raise InputError(f"{path} is not a file that torch.save wrote. {download_hint(path)}")
    try:
        # Only the zip format, torch's default since 1.6, can be mapped into memory.
        content = torch.load(path, weights_only=True, mmap=is_zip, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise _refused_pickle(path, error) from error
    except Exception as error:  # a damaged pickle raises nearly anything: KeyError, IndexError, EOFError, ...
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a mapping of names to tensors.")
    return {str(name): value for name, value in content.items()}


def _refused_pickle(path: Path, error: pickle.UnpicklingError) -> InputError:
    wanted = re.search(r"(?:GLOBAL|class|function) ([\w.]+)", str(error)) if "nsupported" in str(error) else None
    if wanted is None:
        return _damaged(path, str(error).splitlines()[0])
    return InputError(
        f"{path} is a pickle that needs code to be opened ({wanted.group(1)}), which this program never runs "
        "from a checkpoint. If you trust its source, load it where it was made and save the tensors alone, "
        "for example with safetensors.torch.save_file."
    )


# --------------------------------------------------------------------------------------------------------------------
# Containers and names


def strip_wrappers(name: str) -> str:
    """A parameter's name without the prefixes of DDP, FSDP, torch.compile, checkpointing and training wrappers."""
    for wrapper in INNER_WRAPPERS:
        name = name.replace(wrapper, "")
    while True:
        prefix = next((p for p in LEADING_WRAPPERS if name.startswith(p)), None)
        if prefix is None:
            return name
        name = name[len(prefix) :]


def generator_state(mapping: Mapping[str, object], use_ema: bool, source: Path) -> dict[str, Tensor]:
    """The generator's tensors in a checkpoint's mapping, under bare names.

    Taken is `generator_ema` when `use_ema`, else `generator`, if the file has it; otherwise the first there is of
    generator_ema, generator, model, state_dict; otherwise the mapping itself. Raises InputError when that holds
    something other than tensors, or two names that are one without their wrappers.
    """
    wanted = "generator_ema" if use_ema else "generator"
    found = next((name for name in (wanted, *CONTAINERS) if isinstance(mapping.get(name), Mapping)), None)
    if found is None:
        if not all(isinstance(value, Tensor) for value in mapping.values()):
            raise InputError(
                f"{source} holds no generator: none of {', '.join(CONTAINERS)}, nor tensors alone. "
                f"Its top level is {some_names(mapping)}."
            )
        return stripped_tensors(mapping, source)
    if found != wanted:
        logger.info("%s has no %s; taking %s.", source, wanted, found)
    return stripped_tensors(cast("Mapping[str, object]", mapping[found]), source)


def stripped_tensors(container: Mapping[str, object], source: Path) -> dict[str, Tensor]:
    """The tensors of one container under bare names. Raises InputError on non-tensors and on duplicates."""
    state: dict[str, Tensor] = {}
    for name, value in container.items():
        if not isinstance(value, Tensor):
            raise InputError(f"{source}: {name!r} is a {type(value).__name__}; a tensor is wanted.")
        bare = strip_wrappers(name)
        if bare in state:
            raise InputError(f"{source}: two tensors are called {bare!r} without their wrapper prefixes ({name!r}).")
        state[bare] = value
    if not state:
        raise InputError(f"{source} holds no tensors.")
    return state


# --------------------------------------------------------------------------------------------------------------------
# Filling a module


def load_into(
    module: nn.Module,
    state: Mapping[str, Tensor],
    source: Path,
    dtype: torch.dtype,
    device: torch.device | str,
    consume: bool = False,
) -> None:
    """Give `module`, built on the meta device, the tensors of `state` as frozen parameters of `dtype` on `device`.

    Names and shapes are compared first; InputError names a few of those that differ, and nothing is loaded. Tensors
    are converted one at a time, and none keeps the file mapped. Two names with the same tensor share one copy. With
    `consume` the dictionary `state` is emptied on the way, so that a state that is not backed by a file (a merged
    LoRA, a legacy pickle) never stands beside a whole second copy.
    """
    _compare(module, state, source)
    device = torch.device(device)
    converted: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    uses = Counter(id(tensor) for tensor in state.values())
    for name in list(state):
        tensor = state[name]
        key = id(tensor)
        converted[name] = copies[key] if key in copies else _convert(tensor, dtype, device)
        if uses[key] > 1:
            copies[key] = converted[name]
        elif consume and isinstance(state, dict):
            del state[name]
    if consume and isinstance(state, dict):
        state.clear()
    module.load_state_dict(converted, strict=True, assign=True)
    module.requires_grad_(False)
    left = [name for name, tensor in named_tensors(module) if tensor.is_meta and device.type != "meta"]
    assert not left, f"buffers that no checkpoint holds are still on the meta device: {left}"


def named_tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """All parameters and buffers of a module, persistent or not."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def _convert(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    target = dtype if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(device=device, dtype=target, copy=True).contiguous()


def _compare(module: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    own = module.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    misshapen = [
        f"{name} (file {list(state[name].shape)}, model {list(tensor.shape)})"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    faults = [
        f"{len(names)} {kind}: {some_names(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if faults:
        raise InputError(
            f"{source} does not fit {type(module).__name__}: of its {len(own)} tensors {'; '.join(faults)}. "
            "Check that the file and the model (its config.json, model_name) belong together."
        )


def some_names(names: Iterable[str]) -> str:
    """The first few names of many, for a message."""
    listed = list(names)
    shown = ", ".join(listed[:NAMES_SHOWN])
    return shown if len(listed) <= NAMES_SHOWN else f"{shown}, ... ({len(listed)} in all)"
