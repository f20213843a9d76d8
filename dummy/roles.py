"""Which heads are sink, neighbour and dummy heads (Dummy Forcing, arXiv 2601.20499, dynamic head programming).

Roles follow from how a head's attention divides between the first frame, the other earlier frames and the block itself;
they can be written to a file and read back. The file knows nothing of caches and models beyond the number of heads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import InputError


class Role(IntEnum):
    """What a head looks at; the numbers are those of stored files."""

    SINK = 0
    NEIGHBOR = 1
    DUMMY = 2


@dataclass(frozen=True)
class HeadRoles:
    """A role for every head of every layer: `table[layer][head]`."""

    table: tuple[tuple[Role, ...], ...]

    @classmethod
    def from_codes(cls, codes: Sequence[Sequence[int]]) -> HeadRoles:
        """Raises ValueError for a code that is not 0, 1 or 2."""
        return cls(tuple(tuple(Role(code) for code in row) for row in codes))

    @classmethod
    def from_frame_attention(cls, frame_attention: Tensor, num_dummy: int) -> HeadRoles:
        """Assign roles from `frame_attention` [layers, heads, 3], the attention to sink, neighbour and current frames.

        Sink and neighbour shares are normalised over all heads; the `num_dummy` heads whose larger share is smallest
        are dummy (ties by layer and head), the others are sink or neighbour by their larger share.
        """
        shares = frame_attention.double().cpu().flatten(0, 1)
        sink, neighbor = (shares[:, i] / shares[:, i].sum() for i in (0, 1))
        dummy = torch.argsort(torch.maximum(sink, neighbor), stable=True)[:num_dummy]
        codes = torch.where(sink >= neighbor, int(Role.SINK), int(Role.NEIGHBOR))
        codes[dummy] = int(Role.DUMMY)
        return cls.from_codes(codes.view(frame_attention.shape[:2]).tolist())

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and heads."""
        return len(self.table), len(self.table[0])

    def codes(self) -> list[list[int]]:
        return [[int(role) for role in row] for row in self.table]

    def counts(self) -> dict[Role, int]:
        """Heads per role."""
        return {role: sum(row.count(role) for row in self.table) for role in Role}

    def to_json(self) -> dict[str, object]:
        return {
            "layers": self.shape[0],
            "heads": self.shape[1],
            "codes": {role.name.lower(): int(role) for role in Role},
            "roles": self.codes(),
        }

    @classmethod
    def load(cls, path: Path, layers: int, heads: int) -> HeadRoles:
        """Read a roles file, or the metadata of a video that has them under "head_roles".

        Raises InputError if it cannot be read or is for a model with other numbers of layers and heads.
        """
        field = f"dummy_forcing.roles: {path}"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(
                f"{field} cannot be read ({error.strerror}); give a roles file or remove the key"
            ) from error
        except ValueError as error:
            raise InputError(f"{field} is not a JSON file ({error}); give a roles file") from error
        table = content.get("head_roles", content) if isinstance(content, dict) else None
        codes = table.get("roles") if isinstance(table, dict) else None
        if not isinstance(codes, list) or not all(isinstance(row, list) for row in codes):
            raise InputError(f'{field} has no "roles", a list of one list of codes per layer; give a roles file')
        found = len(codes), len(codes[0]) if codes else 0
        if found != (layers, heads) or any(len(row) != heads for row in codes):
            raise InputError(
                f"{field} is for {found[0]} layers of {found[1]} heads, the model has {layers} of {heads}; "
                "use the roles of a model of this size"
            )
        try:
            return cls.from_codes(codes)
        except ValueError as error:
            raise InputError(f"{field}: {error}; codes are 0 sink, 1 neighbor, 2 dummy") from error
