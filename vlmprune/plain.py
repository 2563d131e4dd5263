# SPDX-License-Identifier: Apache-2.0
"""Dataclasses as plain values of JSON and back: fields are checked against their annotations."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import EvaluationError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
WORDS = {
    str: "text",
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    type(None): "null",
}


def plain(value: Any) -> Any:
    """What ``json.dumps`` takes: dataclasses become objects, tuples become lists."""
    # is_dataclass is true of the class itself, too
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


def flat(value: DataclassInstance) -> dict[str, Any]:
    """Fields on one level, for a line of a table; the names are the same for all values of a class.

    Fields of nested dataclasses become ``name_field``, pairs ``name_low`` and ``name_high``, entries of
    mappings ``name_key``; other tuples are joined.
    """
    found: dict[str, Any] = {}
    for name, hint in _hints(type(value)).items():
        _flatten(name, hint, getattr(value, name), found)
    return found


def _flatten(name: str, hint: Any, value: Any, found: dict[str, Any]) -> None:
    inner = get_args(hint)
    # an optional field: its columns are those of its type, also where it holds nothing
    if type(None) in inner:
        (hint,) = (one for one in inner if one is not type(None))
        inner = get_args(hint)
    if isinstance(hint, type) and is_dataclass(hint):
        for part, kind in _hints(hint).items():
            _flatten(f"{name}_{part}", kind, None if value is None else getattr(value, part), found)
    elif get_origin(hint) is Mapping:
        found |= {f"{name}_{key}": part for key, part in (value or {}).items()}
    # a pair; tuple[X, ...] has no fixed columns
    elif get_origin(hint) is tuple and inner[-1] is not ...:
        found[f"{name}_low"], found[f"{name}_high"] = value or (None, None)
    else:
        found[name] = " ".join(map(str, value)) if isinstance(value, tuple) else value


def read(kind: type[T], value: object, name: str) -> T:
    """A dataclass from what ``plain`` made of it; unknown keys are ignored, so that newer files can be read.

    Args:
        name: what the value is, for messages.
    """
    if not isinstance(value, dict):
        raise EvaluationError(f"{name} is {shown(value)}; expected an object")
    lacking = [
        field.name
        for field in fields(kind)
        if field.default is MISSING and field.default_factory is MISSING and field.name not in value
    ]
    if lacking:
        raise EvaluationError(f"{name} lacks {lacking}")
    hints = _hints(kind)
    return kind(**{key: _read(hints[key], value[key], f"{name}: {key}") for key in hints if key in value})


# annotations are text, and slow to resolve for every row
@cache
def _hints(kind: type[DataclassInstance]) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _read(hint: Any, value: object, name: str) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        # at most one type beside None
        (hint,) = (one for one in inner if one is not type(None))
        return _read(hint, value, name)
    if hint is Any or (hint in (str, bool) and type(value) is hint):
        return value
    if isinstance(hint, type) and is_dataclass(hint) and isinstance(value, dict):
        return read(hint, value, name)
    # 3.0 will do for an int, and becomes 3
    if hint in (int, float) and _is_number(value, hint):
        return hint(value)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = inner[:1] * len(value) if inner[-1] is ... else inner  # tuple[X, ...]
        if len(kinds) == len(value):
            pairs = enumerate(zip(kinds, value, strict=True))
            return tuple(_read(one, part, f"{name}[{number}]") for number, (one, part) in pairs)
    if origin is Mapping and isinstance(value, dict):
        return {key: _read(inner[1], part, f"{name}[{key!r}]") for key, part in value.items()}
    raise EvaluationError(f"{name} is {shown(value)}; expected {_expected(hint)}")


def _is_number(value: object, kind: type) -> bool:
    # True is an int to Python
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value) and (kind is float or value == int(value))
    except OverflowError:  # an int beyond all floats
        return False


def _expected(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is tuple:
        return "a list" if inner[-1] is ... else f"a list of {len(inner)}"
    if origin is Mapping or is_dataclass(hint):
        return "an object"
    return WORDS[hint]


def shown(value: object) -> str:
    """A value for a message: short, on one line, with its type where it is not plain to see."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
