"""Calibrated: every head keeps what costs its output least, by a calibration (dummy/calibration/).

Of other videos in a file, so that retentions are fixed from the first block on; or of the video itself, online.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from dummy.calibration.dial import Dial
from dummy.calibration.online import OnlineCalibration
from dummy.config import ONLINE, DummyForcingConfig
from dummy.policy import ContextPolicy, PolicyRequest
from dummy.retentions import RetentionTable
from utils.errors import InputError, require_range
from wan.attention.head_group import Retention
from wan.geometry import MOST_FRAMES

OBSERVED_AFTER = 9  # docs/calibrated.md has what less costs


@dataclass(frozen=True)
class Calibrated:
    """`observed_after`: online, the earlier latent frames that there must be for errors to be seen."""

    observed_after: int = OBSERVED_AFTER

    uses: ClassVar[frozenset[str]] = frozenset(
        ("calibration", "frames_per_head", "max_lengths", "reclassify_on_switch")
    )

    def check(self, settings: DummyForcingConfig) -> None:
        if settings.calibration is None:
            raise InputError(
                "dummy_forcing.calibration: policy calibrated needs a file; make one with python -m pipeline.calibrate "
                "--config_path YAML --out FILE, or use online, by which every video calibrates itself"
            )
        if not settings.online and settings.reclassify_on_switch:
            raise InputError(
                "dummy_forcing.reclassify_on_switch: policy calibrated would ignore it with a file; remove it, or use "
                f"dummy_forcing.calibration={ONLINE}"
            )
        require_range("dummy_forcing.options.observed_after", self.observed_after, 1, MOST_FRAMES, "latent frames")
        if not settings.online and self.observed_after != OBSERVED_AFTER:
            raise InputError(
                "dummy_forcing.options.observed_after: a calibration file would ignore it; remove it, or use "
                f"dummy_forcing.calibration={ONLINE}"
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
        chosen = calibrated_policy
        if request.settings.online:
            chosen = partial(online_policy, ar_start=self.observed_block(request.block, dial.window))
        policy = chosen(dial, frames_asked(request.settings, request.base, dial))
        return replace(policy, at_frames=partial(_within, dial, chosen))

    def observed_block(self, block: int, window: int | None) -> int:
        """The first one with so many earlier frames, or as many as a `window` of relative positions has."""
        most = self.observed_after if window is None else min(self.observed_after, window - block)
        return -(-most // block)


def policy_of_table(table: RetentionTable) -> ContextPolicy:
    """Every head keeps what the table says from the first block on."""
    return ContextPolicy("calibrated", table.largest(), table=table)


def calibrated_policy(dial: Dial, frames: float) -> ContextPolicy:
    """Every head keeps what costs least with `frames` earlier frames a head. Raises InputError if that cannot be."""
    allocation = dial.choose(frames)
    return replace(policy_of_table(allocation.table), dial=dial, allocation=allocation)


def online_policy(dial: Dial, frames: float, ar_start: int) -> ContextPolicy:
    """Every head keeps all that it may until block `ar_start`, and then what would have cost least in that block.

    Raises InputError for frames a head that the dial does not have.
    """
    dial.check(frames)
    online = OnlineCalibration(dial, frames, ar_start)
    beginning = online.beginning(ar_start * dial.calibration.subject.frames_per_block)
    return ContextPolicy("calibrated", beginning, dial=dial, online=online)


def frames_asked(settings: DummyForcingConfig, base: Retention, dial: Dial) -> float:
    """Earlier frames a head that may be spent: as many as there are where the settings ask for more than that without
    giving a number, and as few as can be where the run has yet to measure."""
    least, most = dial.limits()
    if isinstance(settings.frames_per_head, float):
        return settings.frames_per_head
    if settings.speed is not None:
        return least
    return min(max(base.total, least), most) if settings.frames_per_head == "window" else most


def _within(dial: Dial, chosen: Callable[[Dial, float], ContextPolicy], frames: float) -> ContextPolicy:
    least, most = dial.limits()
    return chosen(dial, min(max(frames, least), most))


def _shown(value: object) -> str:
    return "nothing" if value is None else repr(value)[:40]
