"""Calibrated: every head keeps what a calibration file says costs its output least (dummy/calibration/)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from dummy.calibration.dial import Dial
from dummy.config import DummyForcingConfig
from dummy.policy import ContextPolicy, PolicyRequest
from dummy.retentions import RetentionTable
from utils.errors import InputError
from wan.attention.head_group import Retention


@dataclass(frozen=True)
class Calibrated:
    """Retentions are fixed from the first block on, so that no roles are observed."""

    uses: ClassVar[frozenset[str]] = frozenset(("calibration", "frames_per_head", "max_lengths"))

    def check(self, settings: DummyForcingConfig) -> None:
        if settings.calibration is None:
            raise InputError(
                "dummy_forcing.calibration: policy calibrated needs a file; make one with python -m pipeline.calibrate "
                "--config_path YAML --out FILE"
            )
        frames, speed = settings.frames_per_head, settings.speed
        if isinstance(frames, float) and frames >= 0:
            return
        if frames not in ("window", "full") and (speed is None or not speed > 0):
            raise InputError(
                "dummy_forcing.frames_per_head: policy calibrated needs a number of earlier latent frames from 0 on, "
                f"window, full, or a speed above 0 such as 16fps; got {_shown(frames)}"
            )

    def build(self, request: PolicyRequest) -> ContextPolicy:
        """Raises InputError for frames a head that the dial does not have."""
        dial = request.dial
        assert dial is not None
        policy = calibrated_policy(dial, frames_asked(request.settings, request.base, dial))
        return replace(policy, at_frames=partial(_within, dial))


def policy_of_table(table: RetentionTable) -> ContextPolicy:
    """Every head keeps what the table says from the first block on."""
    return ContextPolicy("calibrated", table.largest(), table=table)


def calibrated_policy(dial: Dial, frames: float) -> ContextPolicy:
    """Every head keeps what costs least with `frames` earlier frames a head. Raises InputError if that cannot be."""
    allocation = dial.choose(frames)
    return replace(policy_of_table(allocation.table), dial=dial, allocation=allocation)


def frames_asked(settings: DummyForcingConfig, base: Retention, dial: Dial) -> float:
    """Earlier frames a head that may be spent: as many as there are where the settings ask for more than that without
    giving a number, and as few as can be where the run has yet to measure."""
    least, most = dial.limits()
    if isinstance(settings.frames_per_head, float):
        return settings.frames_per_head
    if settings.speed is not None:
        return least
    return min(max(base.total, least), most) if settings.frames_per_head == "window" else most


def _within(dial: Dial, frames: float) -> ContextPolicy:
    least, most = dial.limits()
    return calibrated_policy(dial, min(max(frames, least), most))


def _shown(value: object) -> str:
    return "nothing" if value is None else repr(value)[:40]
