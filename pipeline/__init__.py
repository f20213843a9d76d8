"""Everything between a configuration and finished videos; programs drive `Pipeline` and `Session`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from utils.interrupts import before_a_module_runs

if TYPE_CHECKING:
    from pipeline.assembly import Pipeline
    from pipeline.session import Session, SessionBlock

before_a_module_runs()

__all__ = ["Pipeline", "Session", "SessionBlock"]

_HOMES = {"Pipeline": "pipeline.assembly", "Session": "pipeline.session", "SessionBlock": "pipeline.session"}


def __getattr__(name: str) -> object:
    """The names above, imported when they are asked for: reading a configuration needs no model."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
