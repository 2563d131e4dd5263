# SPDX-License-Identifier: Apache-2.0
"""Results: what ``results.json`` and ``speed.json`` hold, checked field by field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ...errors import EvaluationError
from ...plain import read, shown
from ...speed.row import SpeedRow
from ..leaderboard.rundir import Run, read_object
from ..stats.summary import Headline, Row

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
AGAIN = "run the leaderboard again, it recomputes results.json"


@dataclass(frozen=True)
class Failed:
    """A spec that has no row, and why."""

    spec: str
    model: str
    task: str
    error: str


@dataclass(frozen=True)
class Results:
    """Rows of a run with what is said about them; ``provenance`` is free-form, and only shown."""

    rows: tuple[Row, ...]
    headline: tuple[Headline, ...]
    failed: tuple[Failed, ...]
    speed: tuple[SpeedRow, ...]
    provenance: Mapping[str, Any]

    @classmethod
    def of(cls, run: Run) -> Results:
        """Of a run folder; its speed.json stands for the speed card in its results."""
        name = str(run.folder / "results.json")
        path = run.folder / "speed.json"
        if not path.is_file():
            return cls.read(run.results, name)
        card = read_object(path)
        if not isinstance(card.get("rows"), list):
            raise EvaluationError(
                f"{path} lacks a list of rows; measure it again with `vlmprune bench --out {run.folder}`, or "
                "delete it"
            )
        return cls.read({**run.results, "speed": card["rows"]}, name)

    @classmethod
    def read(cls, values: Mapping[str, Any], name: str) -> Results:
        """Of the values of a ``results.json``; every entry that cannot be read is named.

        Args:
            name: of the file, for messages.
        """
        # gathered, so that all is said at once
        problems: list[str] = []
        provenance = values.get("provenance") or {}
        if not isinstance(provenance, dict):
            problems.append(f"provenance is {shown(provenance)}; expected an object")
        found = cls(
            rows=_entries(Row, values, "rows", problems),
            headline=_entries(Headline, values, "headline", problems),
            failed=_entries(Failed, values, "failed", problems),
            speed=_entries(SpeedRow, values, "speed", problems),
            provenance=provenance,
        )
        refuse(f"{name} cannot be read", problems)
        return found

    def headline_of(self, setting: tuple[str, str]) -> Headline | None:
        """Of one model and task; None in runs that do not say."""
        return next((one for one in self.headline if (one.model, one.task) == setting), None)


def _entries(kind: type[T], values: Mapping[str, Any], key: str, problems: list[str]) -> tuple[T, ...]:
    """Those that can be read; the others become problems."""
    given = values.get(key) or []
    if not isinstance(given, list):
        problems.append(f"{key} is {shown(given)}; expected a list")
        return ()
    found: list[T] = []
    todo = "remove it and run `vlmprune bench --out` again" if kind is SpeedRow else AGAIN
    for number, value in enumerate(given):
        try:
            found.append(read(kind, value, _entry_name(key, number, value)))
        except EvaluationError as error:
            problems.append(f"{error}; {todo}")
    return tuple(found)


def _entry_name(key: str, number: int, value: object) -> str:
    """By what the entry says of itself, as far as it says so."""
    known = value if isinstance(value, dict) else {}
    named = [shown(known[name]) for name in ("spec", "task", "model") if name in known]
    return f"{key}[{number}] ({', '.join(named)})" if named else f"{key}[{number}]"


def row_name(row: Row) -> str:
    """For messages."""
    return f"{row.spec!r} on {row.task!r} with {row.model!r}"


def refuse(what: str, problems: Iterable[str]) -> None:
    """Raise with all problems, if there are any; the first twenty are written out."""
    told = list(problems)
    if told:
        lines = [f"  {text}" for text in told[:20]]
        if len(told) > 20:
            lines.append(f"  and {len(told) - 20} more")
        counted = "1 problem" if len(told) == 1 else f"{len(told)} problems"
        raise EvaluationError(f"{what}, {counted}:\n" + "\n".join(lines))
