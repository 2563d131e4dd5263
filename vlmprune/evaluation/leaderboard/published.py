# SPDX-License-Identifier: Apache-2.0
"""Published numbers from YAML files that name their sources; shown beside ours, never mixed with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import SpecError
from ...spec import parse
from ...yamlfile import read

KEYS = {"about": str, "columns": dict, "entries": list}
NEEDED = {"spec", "source"}
ENTRY_KEYS = {*NEEDED, "values", "average", "note"}


@dataclass(frozen=True)
class Entry:
    """What one source publishes for one spec.

    Args:
        values: accuracies in % by column, as printed. average: in % of the unpruned model.
    """

    spec: str
    source: str
    values: Mapping[str, float] = field(default_factory=dict)
    average: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Published:
    """Numbers of papers by spec and task.

    Args:
        name: of the file.
        tasks: column of the tables -> task of ours, only where the column is the mean of the task's scores.
    """

    name: str
    tasks: Mapping[str, str]
    entries: tuple[Entry, ...]

    @classmethod
    def load(cls, path: Path) -> Published:
        return read(path, lambda values: cls.of(path.name, values))

    @classmethod
    def of(cls, name: str, values: Any) -> Published:
        """Check plain values: ``columns`` maps each to its task, or to null where the two do not compare."""
        for key, kind in KEYS.items():
            if (
                not isinstance(values, dict)
                or not isinstance(values.get(key), kind)
                or set(values) - set(KEYS)
            ):
                raise SpecError(f"expected a mapping with the keys {list(KEYS)}, {key} as a {kind.__name__}")
        columns = values["columns"]
        entries = tuple(_entry(entry, columns) for entry in values["entries"])
        return cls(name, {key: task for key, task in columns.items() if task}, entries)

    def find(self, spec: str, task: str) -> float | None:
        """The number published for a row of ours, 0 to 1; None without one. Earlier entries win."""
        for entry in self.entries:
            for column, value in entry.values.items():
                if entry.spec == spec and self.tasks.get(column) == task:
                    return value / 100
        return None


def _entry(entry: Any, columns: Mapping[str, Any]) -> Entry:
    whole = (
        isinstance(entry, dict) and NEEDED <= set(entry) <= ENTRY_KEYS and {"values", "average"} & set(entry)
    )
    if not whole:
        wanted = f"expected spec, source, and values or average, of the keys {sorted(ENTRY_KEYS)}"
        raise SpecError(f"entry {entry!r}; {wanted}")
    for key in ("spec", "source", "note"):
        if not isinstance(entry.get(key, ""), str):
            raise SpecError(f"entry {entry!r} has the {key} {entry[key]!r}; expected text")
    spec = parse(entry["spec"])
    if str(spec) != entry["spec"]:
        raise SpecError(f"the spec {entry['spec']!r} is written {str(spec)!r}")
    values = entry.get("values", {})
    if not isinstance(values, dict):
        raise SpecError(f"{entry['spec']}: values is {values!r}; expected a mapping from column to number")
    unknown = sorted(set(values) - set(columns))
    if unknown:
        raise SpecError(f"{entry['spec']}: {unknown} are no columns; expected some of {list(columns)}")
    for value in [*values.values(), entry.get("average", 0)]:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise SpecError(f"{entry['spec']} has the value {value!r}; expected a number as printed")
    return Entry(**entry)
