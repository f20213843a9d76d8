"""The settings of a run, checked, and read from YAML.

This opens the YAML file and nothing else: whether weights and prompts exist is found out by what loads them, and the
conditions that need the model's sizes are in `check_against_model`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dummy.policies.registry import finds_roles
from pipeline.config import paths
from pipeline.config.cache_rules import require
from pipeline.config.checks import check_settings
from pipeline.config.published_keys import expand_overrides, translate
from pipeline.config.settings import Settings
from utils.config import build
from wan.config import ModelConfig
from wan.geometry import LatentGeometry

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InferenceConfig(Settings):
    """Everything a run needs to know beside the prompts; `Settings` has the keys.

    Raises:
        InputError: a value out of range, or values that do not go together; the message says what would.
    """

    def __post_init__(self) -> None:
        check_settings(self)


def load_config(
    source: str | Path | Mapping[str, object] | InferenceConfig, overrides: Sequence[str] = ()
) -> InferenceConfig:
    """From a YAML file of Dummy Forcing, Self-Forcing, LongLive or ours, or from settings, with changes.

    Keys that the published files carry and that have no use here are named in one warning.

    Raises:
        InputError: the file cannot be read, a key is unknown (close ones are suggested), or a value does not fit.
    """
    from utils.settings_file import load_mapping  # the rest of the program does without OmegaConf

    if isinstance(source, InferenceConfig):
        if not overrides:
            return source
        source = as_dict(source)
    settings = translate(load_mapping(source, expand_overrides(overrides)))
    return build(InferenceConfig, paths.expand_paths(settings))


def warn_of_what_is_off(config: InferenceConfig, overrides: Sequence[str]) -> None:
    """Name overrides of `dummy_forcing` in a warning if the section is off in the file, which nobody expects who asks
    for a method."""
    section, switches = "dummy_forcing.", {"dummy_forcing", "dummy_forcing.enabled"}
    keys = [override.partition("=")[0].strip() for override in overrides]
    asked = [key for key in keys if key.startswith(section)]
    if asked and not switches & {*keys} and not config.dummy_forcing.enabled:
        logger.warning("%s: without effect, since dummy_forcing is off; add dummy_forcing=on", ", ".join(asked))


def geometry_of(config: InferenceConfig, channels: int) -> LatentGeometry:
    """The sizes of this configuration's latents, of so many `channels`."""
    height, width = config.latent_size
    return LatentGeometry(height, width, config.num_output_frames, config.num_frame_per_block, channels)


def check_against_model(config: InferenceConfig, model: ModelConfig) -> None:
    """The conditions that need the model's sizes. Raises InputError."""
    forcing = config.dummy_forcing
    if not finds_roles(forcing):
        return
    forcing.budget.check(model.num_layers, model.num_heads)
    least, heads = forcing.budget.possible(model.num_layers, model.num_heads)[0], model.num_layers * model.num_heads
    require(
        forcing.equal_cost is None or least < heads,
        f"dummy_forcing.equal_cost: {forcing.equal_cost} gives neighbor heads what the others save, but all {heads} "
        f"heads are dummy with num_dummy {forcing.num_dummy}; use a smaller num_dummy or remove the equal_cost",
    )


def as_dict(config: InferenceConfig) -> dict[str, object]:
    """The settings as JSON and YAML can write them; `load_config` of the result gives an equal configuration."""
    return {name: _jsonable(value) for name, value in asdict(config).items()}


def _jsonable(value: object) -> object:
    if isinstance(value, dict):
        return {name: _jsonable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return value
