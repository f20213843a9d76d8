"""The head-wise methods by the name that `dummy_forcing.policy` gives. A new one is a file and an entry here.

docs/policies.md shows a complete example of one.
"""

from __future__ import annotations

import difflib
from dataclasses import fields, replace

from dummy.calibration.dial import Dial
from dummy.config import DummyForcingConfig
from dummy.policies.calibrated import Calibrated
from dummy.policies.packed import Packed
from dummy.policies.prune import Prune
from dummy.policy import CachePolicy, ContextPolicy, HeadSplit, PolicyRequest, base_retention
from dummy.roles import HeadRoles
from utils.config import build
from utils.errors import InputError, quoted
from wan.attention.head_group import FULL_HISTORY
from wan.config import ModelConfig, ModelKwargs

POLICIES: dict[str, type[CachePolicy]] = {"packed": Packed, "prune": Prune, "calibrated": Calibrated}

SELECTIVE = (
    *("retention", "equal_cost", "roles", "reclassify_on_switch"),
    *("calibration", "frames_per_head", "max_lengths"),
)
"""Keys of `dummy_forcing` that are refused by policies that do not go by them."""


def cache_policy(settings: DummyForcingConfig) -> CachePolicy:
    """The method that `dummy_forcing` names, with its `options`. Raises InputError for an unknown one, for keys that it
    does not go by, and for whatever it refuses itself."""
    kind = POLICIES.get(settings.policy)
    if kind is None:
        close = difflib.get_close_matches(settings.policy, POLICIES, n=1)
        raise InputError(
            f"dummy_forcing.policy: expected one of {', '.join(POLICIES)}, got the text {quoted(settings.policy)}"
            + (f"; did you mean {close[0]}?" if close else "")
        )
    defaults = {field.name: field.default for field in fields(DummyForcingConfig)}
    for name in SELECTIVE:
        if name not in kind.uses and getattr(settings, name) != defaults[name]:
            takers = [other for other, one in POLICIES.items() if name in one.uses]
            raise InputError(
                f"dummy_forcing.{name}: policy {settings.policy} would ignore it; remove it or use "
                f"dummy_forcing.policy={' or '.join(takers)}"
            )
    policy = build(kind, settings.options or {}, "dummy_forcing.options")
    policy.check(settings)
    return policy


def has_roles(settings: DummyForcingConfig) -> bool:
    """Whether heads have roles with these settings."""
    return settings.enabled and "roles" in cache_policy(settings).uses


def finds_roles(settings: DummyForcingConfig) -> bool:
    """Whether head roles are observed in a video."""
    return has_roles(settings) and (settings.roles is None or settings.reclassify_on_switch)


def policy_from_config(
    window: ModelKwargs,
    settings: DummyForcingConfig,
    block: int,
    roles: HeadRoles | None = None,
    dial: Dial | None = None,
    model: ModelConfig | None = None,
) -> ContextPolicy:
    """The policy that the settings ask for, with blocks of `block` latent frames; the rest as in `PolicyRequest`.

    Raises InputError as `cache_policy` does, and where the policy cannot be built.
    """
    base = base_retention(window, block)
    if not settings.enabled:
        return ContextPolicy("full" if base == FULL_HISTORY else "window", base, window_sinks=base.sink)
    return cache_policy(settings).build(PolicyRequest(settings, block, base, roles, dial, model))


def split_of(settings: DummyForcingConfig, block: int) -> HeadSplit:
    """How heads part with these settings (prune: over full history); given roles are not looked at."""
    split = policy_from_config(ModelKwargs(), replace(settings, enabled=True), block).split
    assert split is not None
    return split
