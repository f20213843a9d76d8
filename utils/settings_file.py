"""Settings from a YAML file and `key=value` overrides, as plain Python values (utils/config.py makes dataclasses)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import yaml  # its stubs are a package of their own
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils.errors import InputError, quoted
from utils.user_paths import exists, read_text, start_of_relative, user_path


def load_mapping(source: str | Path | Mapping[str, object], overrides: Sequence[str]) -> dict[str, object]:
    """Settings of a YAML file, or such settings, changed by dotted overrides such as `model_kwargs.sink_size=3`.

    Interpolations (`${seed}`, `${oc.env:HOME}`) are resolved after the overrides. Override values are typed as YAML
    types them; a list replaces a list, a section is merged into a section.

    Raises:
        InputError: the file is missing, unreadable or no YAML mapping, an override is no `key=value`, or an
            interpolation leads nowhere.
    """
    named = "stored settings" if isinstance(source, Mapping) else f"{source}"
    merged = OmegaConf.create(dict(source)) if isinstance(source, Mapping) else _read_yaml(source)
    for override in overrides:
        merged = _merge(merged, override)
    try:
        container = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{named}: {reason} (key {getattr(error, 'full_key', None) or '?'})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{named}: a value cannot be made of what it refers to ({error})") from error
    return {str(key): value for key, value in cast("dict[object, object]", container).items()}


def _read_yaml(source: str | Path) -> DictConfig:
    path = user_path(str(source), "config_path")
    if not exists(path, "config_path"):
        hint = f"see configs/ for the ones that come along{start_of_relative(path)}"
        raise InputError(f"{path}: no such configuration file; {hint}")
    text = read_text(path, "config_path", "configuration file")
    with _yaml_errors(f"{path}: not valid YAML"):
        # OmegaConf turns a lone word into a mapping, so the kind of the top level is asked of the YAML tree.
        top = yaml.compose(text, Loader=yaml.SafeLoader)
        if top is not None and not isinstance(top, yaml.MappingNode):
            raise InputError(f"{path}: the top level must be a mapping of `key: value` lines, found a {top.id}")
        return OmegaConf.create({}) if top is None else cast(DictConfig, OmegaConf.create(text))


def _merge(settings: DictConfig, override: str) -> DictConfig:
    """The settings changed by one `key=value`."""
    said = f"override {quoted(override)}"
    key, equals, _ = override.partition("=")
    if not equals or not key.strip() or "" in key.split("."):
        raise InputError(f"{said}: expected key=value, for example seed=1 or model_kwargs.sink_size=3")
    with _yaml_errors(f"{said}: the value is not valid YAML"):
        parsed = OmegaConf.from_dotlist([_without_comments(override)])
        OmegaConf.to_container(parsed, throw_on_missing=True)  # merging would skip the value ??? in silence
    try:
        return cast(DictConfig, OmegaConf.merge(settings, parsed))
    except (OmegaConfBaseException, TypeError) as error:  # of a list with a section, or the other way round
        raise InputError(
            f"{said}: puts a section of keys in place of a list, or the other way round; give the whole value, "
            "such as denoising_step_list=[1000,500] or model_kwargs.sink_size=3"
        ) from error


def _without_comments(override: str) -> str:
    """The override with a text in quotation marks of which YAML would take the end, as in `a/folder #1`, for a comment:
    on a command line there are none."""
    key, _, value = override.partition("=")
    if not re.search(r"(^|\s)#", value):
        return override
    node = yaml.compose(value, Loader=yaml.SafeLoader)
    plain = node is None or (isinstance(node, yaml.ScalarNode) and node.style is None)
    return f"{key}={json.dumps(value.strip())}" if plain else override


@contextmanager
def _yaml_errors(where: str) -> Iterator[None]:
    """What parsing raises as an InputError that begins with `where`."""
    try:
        yield
    except InputError:
        raise
    except yaml.YAMLError as error:
        raise InputError(f"{where}, {_yaml_reason(error)}") from error
    except OmegaConfBaseException as error:
        raise InputError(f"{where}: {str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise InputError(f"{where}: too many brackets or sections stand in one another") from error
    except (
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
    ) as error:  # of a tag or a number that no value is made of
        reason = "a number has thousands of digits" if "digits" in str(error) else str(error)
        raise InputError(f"{where}: {reason}") from error


def _yaml_reason(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return str(error).splitlines()[0]
    mark = error.problem_mark
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
