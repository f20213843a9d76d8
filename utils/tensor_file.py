"""Files of tensors with JSON that says what they are (safetensors), written whole and read with mistrust."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.errors import InputError
from utils.files import atomic_write


@dataclass(frozen=True)
class TensorFile:
    """A kind of such files: `key` is that of the metadata, `kind` what people call it, with its article; `command`
    makes one. `where` begins the messages of all errors."""

    key: str
    kind: str
    command: str

    def save(self, path: Path, about: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
        """Raises InputError if the file cannot be written."""
        from safetensors.torch import save

        with atomic_write(path) as partial:
            partial.write_bytes(save(dict(tensors), {self.key: json.dumps(about)}))

    def read_about(self, path: Path, where: str) -> dict[str, Any]:
        """What the file says of itself. Raises InputError if it is of another kind, or damaged."""
        from safetensors import safe_open

        with self._readable(where), safe_open(path, framework="pt") as file:
            content = (file.metadata() or {}).get(self.key)
        if content is None:
            raise InputError(f"{where}: is no {self.key.replace('_', ' ')}; make one with {self.command}")
        try:
            about: object = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise self.broken(where, f"its metadata is no JSON ({error})") from error
        if not isinstance(about, dict):
            raise self.broken(where, f"its metadata is a {type(about).__name__}, not an object")
        return about

    def read_tensors(self, path: Path, where: str) -> dict[str, Tensor]:
        """The tensors by name. Raises InputError if the file is damaged."""
        from safetensors.torch import load_file

        with self._readable(where):
            return dict(load_file(path))

    def broken(self, where: str, what: str) -> InputError:
        """The error for content that cannot be."""
        return InputError(f"{where}: is broken: {what}; make it again with {self.command}")

    @contextmanager
    def _readable(self, where: str) -> Iterator[None]:
        from safetensors import SafetensorError

        try:
            yield
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{where}: cannot be read as {self.kind} ({error}); make it with {self.command}"
            ) from error
