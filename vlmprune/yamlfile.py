# SPDX-License-Identifier: Apache-2.0
"""Reading YAML files that people write: no code in them is run, no key is lost, errors name the file."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .errors import SpecError

T = TypeVar("T")


def read(path: str | PathLike[str], make: Callable[[Any], T]) -> T:
    """What ``make`` makes of the values in a file; errors begin with its path and have one line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read ({error}); expected a YAML file") from error
    try:
        values = yaml.load(text, Loader=_StrictLoader)
    except RecursionError as error:
        raise SpecError(f"{path}: not readable as YAML: nested too deeply; expected a few levels") from error
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: not readable as YAML: {_reason(error)}") from error
    try:
        return make(values)
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from error


def _reason(error: yaml.YAMLError) -> str:
    """Where and what, without the excerpt of the file."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    context = getattr(error, "context", None)
    text = ", ".join(filter(None, (context, problem))) or " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {text}" if mark else text


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses repeated keys, of which YAML would silently keep the last."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:  # the loader checks few of the numbers and dates that it makes of texts
            kind = node.tag.rpartition(":")[2]
            given = f"{reprlib.repr(node.value)} is no {kind} ({type(error).__name__})"
            raise yaml.constructor.ConstructorError(None, None, given, node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):  # else the loader says that it is none
            keys = [str(key.value) for key, _ in node.value]
            if len(set(keys)) < len(keys):
                twice = next(key for key in keys if keys.count(key) > 1)
                problem = f"the key {twice!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)
