"""Prune: dummy heads see nothing earlier, all others what they see without Dummy Forcing (arXiv 2601.20499)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dummy.config import DummyForcingConfig
from dummy.policies.splitting import USES_ROLES, split_from
from dummy.policy import ContextPolicy, PolicyRequest
from dummy.roles import Role
from utils.errors import InputError
from wan.attention.head_group import Retention


@dataclass(frozen=True)
class Prune:
    uses: ClassVar[frozenset[str]] = USES_ROLES

    def check(self, settings: DummyForcingConfig) -> None:
        if settings.preset != "paper":
            raise InputError(
                f"dummy_forcing.preset: policy prune drops all earlier frames of dummy heads and leaves others as they "
                f"are, got {settings.preset}; remove it or use dummy_forcing.policy=packed"
            )

    def build(self, request: PolicyRequest) -> ContextPolicy:
        base = request.base
        by_role = {Role.SINK: base, Role.NEIGHBOR: base, Role.DUMMY: Retention(0, 0)}
        return ContextPolicy("prune", base, split_from(request, by_role), window_sinks=base.sink)
