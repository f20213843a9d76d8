"""Settings from a YAML file and `key=value` overrides, as plain Python values (utils/config.py makes dataclasses)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import yaml  # its stubs are a package of their own
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils.errors import InputError


def load_mapping(source: str | Path | Mapping[str, object], overrides: Sequence[str]) -> dict[str, object]:
    """Settings of a YAML file, or such settings, changed by dotted overrides such as `model_kwargs.sink_size=3`.

    Interpolations (`${seed}`, `${oc.env:HOME}`) are resolved after the overrides. Override values are typed as YAML
    types them; a list replaces a list, a section is merged into a section.

    Raises:
        InputError: the file is missing, unreadable or no YAML mapping, an override is no `key=value`, or an
            interpolation leads nowhere.
    """
    merged = OmegaConf.create(dict(source)) if isinstance(source, Mapping) else _read_yaml(Path(source))
    try:
        for override in overrides:
            merged = cast(DictConfig, OmegaConf.merge(merged, _parse_override(override)))
        container = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{source}: {reason} (key {getattr(error, 'full_key', None) or '?'})") from error
    return {str(key): value for key, value in cast("dict[object, object]", container).items()}


def _read_yaml(path: Path) -> DictConfig:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such configuration file; see configs/ for the ones that come along") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    try:
        # OmegaConf turns a lone word into a mapping, so the kind of the top level is asked of the YAML tree.
        top = yaml.compose(text, Loader=yaml.SafeLoader)
        if top is not None and not isinstance(top, yaml.MappingNode):
            raise InputError(f"{path}: the top level must be a mapping of `key: value` lines, found a {top.id}")
        return OmegaConf.create({}) if top is None else cast(DictConfig, OmegaConf.create(text))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML, {_yaml_reason(error)}") from error
    except OmegaConfBaseException as error:
        raise InputError(f"{path}: {str(error).splitlines()[0]}") from error


def _yaml_reason(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return str(error).splitlines()[0]
    mark = error.problem_mark
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"


def _parse_override(override: str) -> DictConfig:
    key, equals, _ = override.partition("=")
    if not equals or not key.strip() or "" in key.split("."):
        raise InputError(f"override {override!r}: expected key=value, for example seed=1 or model_kwargs.sink_size=3")
    try:
        parsed = OmegaConf.from_dotlist([override])
    except yaml.YAMLError as error:
        raise InputError(f"override {override!r}: the value is not valid YAML, {_yaml_reason(error)}") from error
    OmegaConf.to_container(parsed, throw_on_missing=True)  # merging would skip the value ??? in silence
    return parsed
