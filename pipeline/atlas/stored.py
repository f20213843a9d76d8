"""A stored atlas and the settings that it was recorded with, of which those that find roles may be changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dummy.atlas.stability import has_role_pass, roles_of_videos
from dummy.atlas.stored import read_about
from dummy.atlas.table import Atlas
from dummy.policies.registry import policy_from_config
from pipeline.atlas.recording import role_settings
from pipeline.config.config import InferenceConfig, load_config
from pipeline.config.published_keys import expand_overrides
from pipeline.planning.cost import split_frames
from utils.errors import InputError

# Settings of `dummy_forcing` that decide which roles heads get, and what heads of each role keep.
FINDING = ("policy", "ar_start", "num_dummy", "num_dummy_within", "max_loss", "sink_score_frames")
KEEPING = ("local_context_length", "preset", "retention", "equal_cost")


def load_stored(path: Path, overrides: Sequence[str]) -> tuple[Atlas, InferenceConfig]:
    """The atlas, with roles found by its own settings or by others, if they are given, and these. Raises InputError."""
    config = stored_config(path, overrides)
    return Atlas.load(path, role_settings(config), config.num_frame_per_block), config


def stored_config(path: Path, overrides: Sequence[str]) -> InferenceConfig:
    """Raises InputError for an atlas without usable settings, and for a change that would be ignored."""
    settings = read_about(path).get("config")
    if not isinstance(settings, dict):
        raise InputError(f"{path}: is a broken atlas: config is no section of settings; record it again")
    try:
        stored = load_config(settings)
    except InputError as error:
        raise InputError(f"{path}: its settings cannot be used ({error}); record it again") from error
    changes = expand_overrides(overrides)
    for change, said in zip(changes, overrides, strict=True):
        _check_change(change, f"override {said!r}")
    if changes and not stored.dummy_forcing.enabled:  # what role_settings takes then, to be changed from
        changes = ["dummy_forcing.enabled=true", "dummy_forcing.num_dummy=0.5", *changes]
    return load_config(settings, changes)


def _check_change(change: str, said: str) -> None:
    key, _, value = (part.strip() for part in change.partition("="))
    section, _, name = key.partition(".")
    if section != "dummy_forcing":
        raise InputError(f"{said}: of a stored atlas only dummy_forcing settings can be changed")
    if name == "enabled":
        if value.lower() != "true":
            raise InputError(
                f"{said}: a stored atlas is looked at for the roles that Dummy Forcing would find, so it "
                "cannot be off here; leave the override out"
            )
    elif name and name.partition(".")[0] not in (*FINDING, *KEEPING):
        raise InputError(
            f"{said}: does not change the roles or what heads keep, so a stored atlas would ignore it; "
            f"use one of {', '.join((*FINDING, *KEEPING))}"
        )


def run_facts(atlas: Atlas, config: InferenceConfig) -> list[tuple[str, str]]:
    """What a run of these settings would keep, by the roles that the atlas's videos give; as (name, value)."""
    past = config.num_output_frames - 2 * config.num_frame_per_block
    measured = isinstance(atlas.forcing.equal_cost, float)  # what neighbour heads keep is known on the machine alone
    if past < 0 or measured or not has_role_pass(atlas):
        return []
    split = policy_from_config(config.model_kwargs, atlas.forcing, config.num_frame_per_block).split
    assert split is not None
    kept = [split_frames(split, roles, past) for roles in roles_of_videos(atlas)]
    mean = sum(kept) / len(kept)
    return [("earlier frames a head", f"{min(kept):.2f} to {max(kept):.2f} of {past}, {mean:.2f} on average")]
