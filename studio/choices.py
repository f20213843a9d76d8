"""What viewers may choose for a video: seed, policy, frames a head, sinks at a switch.

A choice becomes overrides of the session's settings here and nowhere else, from the server's own list of policies: a
client names a policy, never a setting, so nothing that it writes becomes a path.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipeline import Pipeline
from pipeline.config.config import InferenceConfig, as_dict, load_config
from studio.protocol import Restart
from utils.config import text_override
from utils.errors import InputError, quoted

logger = logging.getLogger(__name__)

_NO_CALIBRATION = tuple(f"dummy_forcing.{key}=null" for key in ("calibration", "frames_per_head", "max_lengths"))
_NO_ROLES = (
    *(f"dummy_forcing.{key}=null" for key in ("retention", "equal_cost", "roles")),
    "dummy_forcing.reclassify_on_switch=false",
    "dummy_forcing.preset=paper",
)
_LABELS = {
    "configured": "as configured",
    "window": "window, all heads alike",
    "paper": "packed, as in the paper",
    "anchored": "packed and anchored",
    "prune": "prune",
    "calibrated": "calibrated, head by head",
    "online": "calibrated by the video itself",
}
_DIALLED = ("calibrated", "online")
DIAL_STEP = 0.5  # frames a head, so that the number of different policies in memory is bounded


@dataclass(frozen=True)
class Policy:
    """One that viewers may choose. `dial`: fewest, most and usual frames a head, where that is theirs to say."""

    name: str
    overrides: tuple[str, ...]
    dial: tuple[float, float, float] | None = None

    @property
    def label(self) -> str:
        return _LABELS[self.name]


@dataclass(frozen=True)
class Choice:
    """What a video is made with. `prompt` is its first one."""

    prompt: str
    seed: int
    policy: str
    frames_per_head: float | None
    global_sink: bool


class Choices:
    """The policies that a pipeline can have without end."""

    def __init__(self, pipeline: Pipeline, calibration: str | None) -> None:
        """Raises InputError if the configuration itself is for videos of a certain length alone, or `calibration`, a
        file that somebody has asked for, cannot be used."""
        pipeline.endless_policy()
        self._config = pipeline.config
        self._pipeline = pipeline
        self.policies = {one.name: one for one in self._possible(calibration)}
        same = [one.name for one in self.policies.values() if one.name != "configured" and self._is_configured(one)]
        if same:
            del self.policies["configured"]
        self.usual = same[0] if same else "configured"

    def _possible(self, calibration: str | None) -> Iterator[Policy]:
        for policy in _policies(self._config, calibration):
            try:
                if policy.name in _DIALLED:
                    yield self._with_dial(policy)
                else:
                    self._pipeline.endless_policy(policy.overrides)
                    yield policy
            except InputError as error:
                if policy.name == "calibrated" and calibration is not None:
                    raise InputError(f"--calibration: {error}") from error
                logger.info("policy %s is not offered: %s", policy.name, error)

    def _with_dial(self, policy: Policy) -> Policy:
        dial = self._pipeline.endless_policy((*policy.overrides, "dummy_forcing.frames_per_head=full")).dial
        assert dial is not None
        least, most = dial.limits()
        usual = min(max(round(most / 2 / DIAL_STEP) * DIAL_STEP, least), most)
        return replace(policy, dial=(least, most, usual))

    def _is_configured(self, policy: Policy) -> bool:
        if policy.dial is not None:
            return False
        return load_config(as_dict(self._config), policy.overrides).policy == self._config.policy == policy.name

    def first(self, prompt: str) -> Choice:
        """What a new session begins with."""
        dial = self.policies[self.usual].dial
        frames = None if dial is None else dial[2]
        return Choice(prompt, self._config.seed, self.usual, frames, self._config.global_sink)

    def changed(self, choice: Choice, asked: Restart) -> Choice:
        """Raises InputError for a policy that there is not, or frames that it does not have."""
        name = choice.policy if asked.policy is None else asked.policy
        if name not in self.policies:
            raise InputError(f"policy: {quoted(name)} is none of {', '.join(self.policies)}")
        dial = self.policies[name].dial
        if dial is None and asked.frames_per_head is not None:
            raise InputError(f"frames_per_head: policy {name} has no such dial; leave it out")
        return Choice(
            choice.prompt if asked.prompt is None else asked.prompt,
            choice.seed if asked.seed is None else asked.seed,
            name,
            None if dial is None else _on_dial(dial, asked.frames_per_head, choice.frames_per_head),
            choice.global_sink if asked.global_sink is None else asked.global_sink,
        )

    def overrides(self, choice: Choice) -> tuple[str, ...]:
        """Of the session's settings."""
        made = list(self.policies[choice.policy].overrides)
        if choice.frames_per_head is not None:
            made.append(f"dummy_forcing.frames_per_head={choice.frames_per_head:g}")
        if choice.global_sink != self._config.global_sink:
            made.append(f"global_sink={str(choice.global_sink).lower()}")
        return tuple(made)


def _on_dial(dial: tuple[float, float, float], asked: float | None, before: float | None) -> float:
    least, most, usual = dial
    frames = asked if asked is not None else before if before is not None else usual
    if not least <= frames <= most:
        raise InputError(f"frames_per_head: must be from {least:g} to {most:g}, got {frames:g}")
    return min(max(round(frames / DIAL_STEP) * DIAL_STEP, least), most)


def _policies(config: InferenceConfig, calibration: str | None) -> Iterator[Policy]:
    """All that there are, whether they can be had or not."""
    yield Policy("configured", ())
    yield Policy("window", ("dummy_forcing.enabled=false",))
    packed = ("dummy_forcing.enabled=true", "dummy_forcing.policy=packed", *_NO_CALIBRATION)
    for preset in ("paper", "anchored"):
        yield Policy(preset, (*packed, f"dummy_forcing.preset={preset}"))
    prune = ("dummy_forcing.enabled=true", "dummy_forcing.policy=prune", *_NO_CALIBRATION)
    yield Policy("prune", (*prune, *_NO_ROLES))
    own = ("dummy_forcing.enabled=true", "dummy_forcing.policy=calibrated", *_NO_ROLES)
    file = calibration or (None if config.dummy_forcing.online else config.dummy_forcing.calibration)
    if file is not None:
        yield Policy("calibrated", (*own, text_override("dummy_forcing.calibration", file)))
    yield Policy("online", (*own, "dummy_forcing.calibration=online", "dummy_forcing.reclassify_on_switch=true"))
