"""Frozen dataclasses from settings, plain Python values as a YAML file types them (utils/settings_file.py).

This file is generic: it knows no field by name, no default and no range. It is strict about types, because a quoted
number or a misspelt key that is accepted in silence costs a run of hours. Ranges and conditions between fields belong
to the dataclasses.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeGuard, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from utils.errors import FEW, InputError, brief, is_endless, quoted, shown_key

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

_MISFIT = object()  # tells a value of another type from None, which is a value
_CLOSE = 0.7  # likeness from which on a key is suggested (difflib)
_NAMES = {int: ("an integer", "integers"), float: ("a number", "numbers"), str: ("text", "texts")}


def build(cls: type[T], mapping: Mapping[str, object], where: str = "") -> T:
    """Makes dataclass `cls`, and those nested in it, from plain values; `where` is the dotted prefix in messages.

    Values must have the annotated type: int (of 64 bits), float (an integer will do, infinities will not), str, bool,
    None (also written as Python does), Literal, unions, tuple and list (from a list), dict (any mapping with keys of
    text, taken as it is), or a dataclass (from a mapping).
    Nothing is converted beyond that.

    Raises:
        InputError: unknown keys, all of them (the message suggests close ones, also from other sections), a missing
            one, a value of another type, or whatever the dataclass itself refuses.
    """
    _refuse_unknown_keys(cls, mapping, where)
    return _build(cls, mapping, where)


def _dotted_keys(cls: type[DataclassInstance], prefix: str) -> Iterator[str]:
    """Every key of a dataclass and of those nested in it, with its section: `seed`, `model_kwargs.sink_size`."""
    for name, annotation in get_type_hints(cls).items():
        yield _join(prefix, name)
        for option in _options(annotation):
            if _is_dataclass(option):
                yield from _dotted_keys(option, _join(prefix, name))


def _refuse_unknown_keys(cls: type[DataclassInstance], mapping: Mapping[str, object], where: str) -> None:
    found = list(_unknown_keys(cls, mapping, where))
    if not found:
        return
    known = tuple(_dotted_keys(cls, where))
    if len(found) == 1:
        key, section, siblings = found[0]
        close = _close_keys(key, section, siblings, known)
        hint = f"; did you mean {' or '.join(close)}?" if close else "; remove it"
        if not close and len(siblings) <= FEW:
            hint = f"; known here: {', '.join(siblings)}"
        raise InputError(f"{_join(section, shown_key(key))}: unknown key{hint}")
    told = []
    for key, section, siblings in found:
        close = _close_keys(key, section, siblings, known)
        told.append(_join(section, shown_key(key)) + (f" (did you mean {' or '.join(close)}?)" if close else ""))
    raise InputError(f"{len(found)} unknown keys: {', '.join(told)}; correct or remove them")


def _unknown_keys(
    cls: type[DataclassInstance], mapping: Mapping[str, object], where: str
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Of a mapping and the sections in it: the key, its section, and the keys that the section has."""
    hints = get_type_hints(cls)
    names = tuple(field.name for field in dataclasses.fields(cls) if field.init)
    for key, value in mapping.items():
        if key not in names:
            yield str(key), where, names
            continue
        for section, content, place in _sections(hints[key], value, _join(where, key)):
            yield from _unknown_keys(section, content, place)


def _sections(
    annotation: object, value: object, where: str
) -> Iterator[tuple[type[DataclassInstance], Mapping[str, object], str]]:
    """The sections in a value, alone or in a list: the dataclass of each, what it holds, and where it stands."""
    for option in _options(annotation):
        if _is_dataclass(option) and isinstance(value, Mapping):
            yield option, value, where
        if get_origin(option) in (tuple, list) and isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                yield from _sections(get_args(option)[0], item, f"{where}[{index}]")


def _close_keys(key: str, section: str, siblings: Sequence[str], known: Sequence[str]) -> list[str]:
    leaves = {dotted.rpartition(".")[2]: dotted for dotted in reversed(known)}
    if key in leaves:  # spelt right, in another section
        return [leaves[key]]
    close = [_join(section, name) for name in difflib.get_close_matches(key, siblings, n=3, cutoff=_CLOSE)]
    return close or [leaves[leaf] for leaf in difflib.get_close_matches(key, list(leaves), n=3, cutoff=_CLOSE)]


def _build(cls: type[T], mapping: Mapping[str, object], where: str) -> T:
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if field.init and field.name not in mapping and not has_default:
            raise InputError(f"{_join(where, field.name)}: missing, expected {_describe(hints[field.name])}")
    return cls(**{key: _convert(hints[key], value, _join(where, key)) for key, value in mapping.items()})


def _convert(annotation: object, value: object, where: str) -> object:
    for option in _options(annotation):
        if get_origin(option) in (tuple, list) and isinstance(value, (list, tuple)):
            return _convert_sequence(option, value, where)
        if _is_dataclass(option) and isinstance(value, Mapping):
            return _build(option, value, where)
        if get_origin(option) is dict and isinstance(value, Mapping):
            return {str(key): item for key, item in value.items()}
    for option in sorted(_options(annotation), key=lambda option: option is not type(None)):  # "None" is no text
        converted = _convert_scalar(option, value)
        if converted is not _MISFIT:
            return converted
    raise InputError(_type_message(annotation, value, where))


def _convert_scalar(annotation: object, value: object) -> object:
    """The value where it has the type, a float for an integer where a float is due, else `_MISFIT`."""
    if is_endless(value):
        return _MISFIT
    if get_origin(annotation) is Literal:
        # True equals 1 in Python, so the type is compared too.
        fits = any(type(choice) is type(value) and choice == value for choice in get_args(annotation))
        return value if fits else _MISFIT
    if annotation is float and type(value) in (int, float):
        number = float(cast(float, value))
        return number if math.isfinite(number) else _MISFIT
    if annotation is type(None) and isinstance(value, str) and value.lower() == "none":
        return None
    return value if annotation in (int, str, bool, type(None)) and type(value) is annotation else _MISFIT


def _convert_sequence(annotation: object, value: Sequence[object], where: str) -> object:
    arguments = get_args(annotation)
    if get_origin(annotation) is list:
        return [_convert(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if arguments[-1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        raise InputError(_type_message(annotation, value, where))
    pairs = zip(arguments, value, strict=True)
    return tuple(_convert(item_type, item, f"{where}[{index}]") for index, (item_type, item) in enumerate(pairs))


def _type_message(annotation: object, value: object, where: str) -> str:
    message = f"{where}: expected {_describe(annotation)}, got {_show(value)}"
    texts = [
        str(choice) for option in _options(annotation) for choice in get_args(option) if get_origin(option) is Literal
    ]
    close = difflib.get_close_matches(value, texts, n=1) if isinstance(value, str) else []
    return f"{message}; did you mean {close[0]}?" if close else message


def _show(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f"the text {quoted(value)}"
    if isinstance(value, Mapping):
        return f"a section {brief(value)}"
    return brief(value) + ("" if is_endless(value) else f" ({type(value).__name__})")


def _describe(annotation: object) -> str:
    options = _options(annotation)
    if len(options) > 1:
        return " or ".join(_describe(option) for option in options)
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(str(choice) for choice in arguments)}"
    if get_origin(annotation) in (tuple, list):
        count = "" if arguments[-1] is Ellipsis or get_origin(annotation) is list else f"{len(arguments)} "
        section = _is_dataclass(arguments[0])
        entries = _describe(arguments[0]).replace("a section", "sections") if section else "entries"
        return f"a list of {count}{_NAMES[arguments[0]][1] if arguments[0] in _NAMES else entries}"
    if get_origin(annotation) is dict:
        return "a section"
    if _is_dataclass(annotation):
        return f"a section with the keys {', '.join(field.name for field in dataclasses.fields(annotation))}"
    if annotation is bool:
        return "true or false"
    if annotation is type(None):
        return "null"
    return _NAMES[annotation][0] if isinstance(annotation, type) and annotation in _NAMES else str(annotation)


def _options(annotation: object) -> tuple[object, ...]:
    """Members of a union; of any other annotation, itself alone."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _is_dataclass(annotation: object) -> TypeGuard[type[DataclassInstance]]:
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def _join(prefix: str, name: object) -> str:
    return f"{prefix}.{name}" if prefix else str(name)


def text_override(key: str, text: object) -> str:
    """The `key=value` that means this text as it stands: no number, comment or section of YAML, nothing referred to."""
    literal = re.sub(r"(\\*)\$\{", lambda found: rf"{found[1] * 2}\${{", str(text))  # as OmegaConf escapes it
    return f'{key}="{"".join(map(_in_quotes, literal))}"'


def _in_quotes(char: str) -> str:
    """As YAML has it between double quotes."""
    plain = char.isascii() and char.isprintable() and char not in '"\\'
    return char if plain else f"\\U{ord(char):08x}"
