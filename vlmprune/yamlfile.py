# SPDX-License-Identifier: Apache-2.0
"""Reading YAML files that people write: no code in them is run, no key is lost, errors name the file."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .errors import SpecError

T = TypeVar("T")


def read(path: str | PathLike[str], make: Callable[[Any], T]) -> T:
    """What ``make`` makes of the values in a file; errors begin with its path."""
    try:
        return make(yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_StrictLoader))
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: not readable as YAML: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read ({error}); expected a YAML file") from error
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from error


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses repeated keys, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if len(set(map(str, keys))) < len(keys):
            raise yaml.constructor.ConstructorError(None, None, f"a key is given twice among {keys}", node.start_mark)
        return super().construct_mapping(node, deep)
