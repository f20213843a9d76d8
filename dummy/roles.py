"""Which heads are sink, neighbour and dummy heads (Dummy Forcing, arXiv 2601.20499, dynamic head programming).

Roles follow from how a head's attention divides between the first frame, the other earlier frames and the block itself;
they can be written to a file and read back. The file knows nothing of caches and models beyond the number of heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import torch
from torch import Tensor

from dummy.budget import DummyBudget
from utils.errors import InputError, brief
from utils.user_paths import read_json


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
    def from_frame_attention(
        cls, frame_attention: Tensor, budget: DummyBudget, lost: Tensor | None = None
    ) -> HeadRoles:
        """Assign roles from `frame_attention` [layers, heads, 3], the attention to sink, neighbour and current frames.

        Sink and neighbour shares are normalised over all heads; the heads whose larger share is smallest are dummy, as
        many as `budget` says (ties by layer and head), the others are sink or neighbour by their larger share. `lost`
        [layers, heads]: the attention that a head loses as a dummy head, by default all but that to the block.
        """
        sink, neighbor = normalised(frame_attention)
        if lost is None:
            lost = frame_attention[..., :2].sum(-1)
        codes = torch.where(sink >= neighbor, int(Role.SINK), int(Role.NEIGHBOR))
        codes[budget.choose(torch.maximum(sink, neighbor), lost.cpu())] = int(Role.DUMMY)
        return cls.from_codes(codes.tolist())

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
            "counts": {role.name.lower(): count for role, count in self.counts().items()},
            "roles": self.codes(),
        }

    @classmethod
    def load(cls, path: Path, layers: int, heads: int) -> HeadRoles:
        """Read a roles file, or the metadata of a video that has them under "head_roles".

        Raises InputError if it cannot be read, contradicts itself, or is for a model with other numbers of layers and
        heads.
        """
        roles, field = cls.read(path, "dummy_forcing.roles"), f"dummy_forcing.roles: {path}"
        if roles.shape != (layers, heads):
            raise InputError(
                f"{field} is for {roles.shape[0]} layers of {roles.shape[1]} heads, the model has {layers} of {heads}; "
                "use the roles of a model of this size"
            )
        return roles

    @classmethod
    def read(cls, path: Path, setting: str = "") -> HeadRoles:
        """As `load`, for a model of any size; messages begin with the `setting` that names the file, and it."""
        field = f"{setting}: {path}" if setting else f"{path}"
        table = _roles_table(path, setting)
        roles = _table_of_codes(table, field)
        found = roles.to_json()
        for key in ("layers", "heads", "counts"):
            if table.get(key, found[key]) != found[key]:
                raise InputError(
                    f"{field} says {key}: {brief(table[key])}, but its table has {found[key]}; it was cut or "
                    "changed by hand, so make it again or mend what it says"
                )
        if not _is_confidence(table.get("confidence"), roles.shape):
            raise InputError(
                f"{field}: its confidence is no number from 0 to 1 for each head; make the file again or remove the key"
            )
        return roles


def _table_of_codes(table: Mapping[str, object], field: str) -> HeadRoles:
    codes = table.get("roles")
    if not isinstance(codes, list) or not codes or not all(isinstance(row, list) for row in codes):
        raise InputError(f'{field} has no "roles", a list of one list of codes per layer; give a roles file')
    widths = sorted({len(row) for row in codes})
    if len(widths) > 1 or not widths[0]:
        raise InputError(f"{field} has layers of {widths} heads; all layers of a model have equally many")
    for code in (code for row in codes for code in row):
        if type(code) is not int or code not in list(Role):  # true and 1.0 equal 1 in Python
            raise InputError(f"{field}: {brief(code)} is no code; codes are 0 sink, 1 neighbor, 2 dummy")
    return HeadRoles.from_codes(codes)


def _is_confidence(value: object, shape: tuple[int, int]) -> bool:
    """Whether it is what an atlas writes beside the roles, [layers, heads] from 0 to 1, or absent."""
    if value is None:
        return True
    if not isinstance(value, list) or not all(isinstance(row, list) and len(row) == shape[1] for row in value):
        return False
    return len(value) == shape[0] and all(
        type(share) in (int, float) and 0 <= share <= 1 for row in value for share in row
    )


def _roles_table(path: Path, setting: str) -> dict[str, object]:
    content = read_json(path, setting, "roles file")
    table = content.get("head_roles", content) if isinstance(content, dict) else None
    return table if isinstance(table, dict) else {}


def normalised(frame_attention: Tensor) -> tuple[Tensor, Tensor]:
    """[layers, heads, 3] to the sink and the neighbour column [layers, heads], each divided by its sum over all heads;
    float64, on the CPU. A column of zeros, where a block has no such frames, stays one."""
    shares = frame_attention.double().cpu()
    sink, neighbor = (shares[..., i] / shares[..., i].sum().clamp_min(1e-30) for i in (0, 1))
    return sink, neighbor


def dummy_ranks(frame_attention: Tensor) -> Tensor:
    """[layers, heads] of int64: a head's place, from 0 on, in the order in which heads become dummy."""
    scores = torch.maximum(*normalised(frame_attention)).flatten()
    ranks = torch.empty(len(scores), dtype=torch.int64)
    ranks[torch.argsort(scores, stable=True)] = torch.arange(len(scores))
    return ranks.view(frame_attention.shape[:2])
