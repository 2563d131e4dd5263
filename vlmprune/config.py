# SPDX-License-Identifier: Apache-2.0
"""Config: what to compare, read from a YAML file; every key is checked, none is ignored."""

from __future__ import annotations

from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from .errors import SpecError, did_you_mean
from .spec import Spec, parse


@dataclass(frozen=True)
class Config:
    """A comparison of methods.

    Args:
        models: ``"tiny"``, HF ids or folders.
        specs: what to run on each model, budgets included.
        tasks: what to answer.
        seeds: of seeded methods and resampling.
        out: folder for the results.
    """

    models: tuple[str, ...]
    specs: tuple[Spec, ...]
    tasks: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    out: str | None = None

    @classmethod
    def of(cls, values: Any) -> Config:
        """Check plain values, as YAML has them."""
        known = [field.name for field in fields(cls)]
        if not isinstance(values, dict):
            raise SpecError(f"a config is a mapping, got {type(values).__name__}; expected the keys {known}")
        for key in values:
            if key not in known:
                raise SpecError(f"unknown key {key!r}; expected {known}.{did_you_mean(key, known)}")
        for key in ("models", "specs"):
            if key not in values:
                raise SpecError(f"the key {key!r} is missing; expected a list: {key}: [...]")
        texts = _list("specs", values["specs"], str)
        specs = tuple(map(parse, texts))
        for spec in specs:
            spec.build(require_budget=True)
        _distinct("specs", specs)
        out = values.get("out")
        if out is not None and not (isinstance(out, str) and out):
            raise SpecError(f"out={out!r}; expected the path of a folder")
        return cls(
            models=_list("models", values["models"], str),
            specs=specs,
            tasks=_list("tasks", values["tasks"], str) if "tasks" in values else (),
            seeds=_list("seeds", values["seeds"], int) if "seeds" in values else (0,),
            out=out,
        )


def load(path: str | PathLike[str]) -> Config:
    """Read a YAML file; errors begin with its path."""
    try:
        return Config.of(yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_StrictLoader))
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: not readable as YAML: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read ({error}); expected a YAML file") from error
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from error


def _list(key: str, value: Any, kind: type) -> tuple[Any, ...]:
    if not isinstance(value, list) or not value:
        raise SpecError(f"{key}={value!r}; expected a list with at least one entry: {key}: [...]")
    for item in value:
        if type(item) is not kind or item == "":
            raise SpecError(f"{key} holds {item!r}, a {type(item).__name__}; expected {kind.__name__} (quote what is text)")
    _distinct(key, value)
    return tuple(value)


def _distinct(key: str, values: Any) -> None:
    twice = [str(value) for number, value in enumerate(values) if value in values[:number]]
    if twice:
        raise SpecError(f"{key} lists {twice[0]!r} twice; list it once")


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses repeated keys, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if len(set(map(str, keys))) < len(keys):
            raise yaml.constructor.ConstructorError(None, None, f"a key is given twice among {keys}", node.start_mark)
        return super().construct_mapping(node, deep)
