# SPDX-License-Identifier: Apache-2.0
"""Published numbers, read from YAML files that name the source of each; shown beside ours, never mixed with them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SpecError
from ..spec import parse
from ..yamlfile import read

KEYS = {"about": str, "columns": dict, "entries": list}
NEEDED = {"spec", "source"}
ENTRY_KEYS = {*NEEDED, "values", "average", "note"}


@dataclass(frozen=True)
class Published:
    """Numbers of papers by spec and task.

    Args:
        name: of the file.
        tasks: column of the tables -> task of ours, only where the column is the mean of the scores that the task gives.
        entries: as in the file: spec, source, values by column (as printed), average (% of the unpruned model), note.
    """

    name: str
    tasks: dict[str, str]
    entries: tuple[dict[str, Any], ...]

    @classmethod
    def load(cls, path: Path) -> Published:
        return read(path, lambda values: cls.of(path.name, values))

    @classmethod
    def of(cls, name: str, values: Any) -> Published:
        """Check plain values: ``columns`` maps each column to its task, or to null where the two cannot be compared."""
        for key, kind in KEYS.items():
            if not isinstance(values, dict) or not isinstance(values.get(key), kind) or set(values) - set(KEYS):
                raise SpecError(f"expected a mapping with the keys {list(KEYS)}, {key} as a {kind.__name__}")
        columns = values["columns"]
        for entry in values["entries"]:
            _check(entry, columns)
        return cls(name, {key: task for key, task in columns.items() if task}, tuple(values["entries"]))

    def find(self, spec: str, task: str) -> float | None:
        """The number published for a row of ours, 0 to 1; None where there is none. Earlier entries win."""
        for entry in self.entries:
            for column, value in entry.get("values", {}).items():
                if entry["spec"] == spec and self.tasks.get(column) == task:
                    return value / 100
        return None


def _check(entry: Any, columns: dict[str, Any]) -> None:
    if not isinstance(entry, dict) or not NEEDED <= set(entry) <= ENTRY_KEYS or not {"values", "average"} & set(entry):
        raise SpecError(f"entry {entry!r}; expected spec, source, and values or average, of the keys {sorted(ENTRY_KEYS)}")
    spec = parse(entry["spec"])
    if str(spec) != entry["spec"]:
        raise SpecError(f"the spec {entry['spec']!r} is written {str(spec)!r}")
    values = entry.get("values", {})
    unknown = sorted(set(values) - set(columns))
    if unknown:
        raise SpecError(f"{entry['spec']}: {unknown} are no columns; expected some of {list(columns)}")
    for value in [*values.values(), entry.get("average", 0)]:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise SpecError(f"{entry['spec']} has the value {value!r}; expected a number as printed")
