# SPDX-License-Identifier: Apache-2.0
"""Published numbers from YAML files that name their sources; shown beside ours, never mixed with them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

from ...core.budget import Budget
from ...errors import SpecError, did_you_mean
from ...spec import parse
from ...yamlfile import read
from ..stats.seeds import method_of

FOLDER = Path(__file__).parents[2] / "assets" / "published"
# what a file must have at its top, and what it may have beside
KEYS = {"about": str, "columns": dict, "entries": list}
SIZES = ("tokens", "crops")
NEEDED = {"spec", "source"}
ENTRY_KEYS = {*NEEDED, "values", "average", "note", "ci", "measured"}
SAME = 0.02  # shares of the tokens that differ by less are one budget: 48 of 144 is written 0.333, too
APART = 3.0  # budgets of one table further apart than this factor say nothing about those between them
How = Literal["table", "derived", "interpolated"]


@dataclass(frozen=True)
class Entry:
    """What one source publishes for one spec.

    Args:
        values: accuracies in % by column, as printed. ci: their 95 % intervals, where they are known.
        average: in % of the unpruned model.
        measured: of numbers that were measured with this package, what they were measured with.
    """

    spec: str
    source: str
    values: Mapping[str, float] = field(default_factory=dict)
    average: float | None = None
    note: str = ""
    ci: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def method(self) -> str:
        return method_of(self.spec)

    @cached_property
    def budget(self) -> Budget | None:
        """Of the last part that has one."""
        found = [part.budget for part in parse(self.spec).parts if part.budget is not None]
        return found[-1] if found else None


@dataclass(frozen=True)
class Retained:
    """What is published of a method at a budget: its average in % of the unpruned model.

    Args:
        by_source: the averages, by who prints them.
        how: "table", printed for that budget; "derived", the mean over the columns of a table that prints no
            average; "interpolated" between two budgets of one table, linear in the logarithm of the budget.
    """

    by_source: Mapping[str, float]
    how: How

    @property
    def value(self) -> float:
        """The median over the sources, which do not share one protocol."""
        return median(self.by_source.values())

    @property
    def ends(self) -> tuple[float, float]:
        """The lowest and the highest of the sources."""
        return min(self.by_source.values()), max(self.by_source.values())


@dataclass(frozen=True)
class Published:
    """Numbers of papers by spec and task.

    Args:
        name: of the file.
        tasks: column of the tables -> task of ours, only where the column is the mean of the task's scores.
        columns: of the tables. about: what was measured, in a line.
        tokens: visual tokens of an unpruned picture; None where the file does not say.
        crops: tiles or frames that they are of.
    """

    name: str
    tasks: Mapping[str, str]
    entries: tuple[Entry, ...]
    columns: tuple[str, ...] = ()
    about: str = ""
    tokens: int | None = None
    crops: int = 1

    @classmethod
    def load(cls, path: Path) -> Published:
        return read(path, lambda values: cls.of(path.name, values))

    @classmethod
    def shipped(cls, name: str) -> Published:
        """A table of this package by its name, such as ``"llava-1.5-7b"``."""
        known = shipped()
        if name not in known:
            raise SpecError(
                f"published numbers {name!r} are not in the package; expected one of {known}, or the path of "
                f"a .yaml file.{did_you_mean(name, known)}"
            )
        return cls.load(FOLDER / f"{name}.yaml")

    @classmethod
    def find_file(cls, text: str, folder: Path | None = None) -> Published:
        """By name, or by the path of a YAML file that starts at ``folder``."""
        if text.endswith((".yaml", ".yml")):
            return cls.load((folder or Path()) / text)
        return cls.shipped(text)

    @classmethod
    def of(cls, name: str, values: Any) -> Published:
        """Check plain values: ``columns`` maps each to its task, or to null where the two do not compare."""
        for key, kind in KEYS.items():
            if (
                not isinstance(values, dict)
                or not isinstance(values.get(key), kind)
                or set(values) - {*KEYS, *SIZES}
            ):
                raise SpecError(
                    f"expected a mapping with the keys {list(KEYS)}, {key} as a {kind.__name__}; of others "
                    f"only {list(SIZES)}"
                )
        for key in SIZES:
            if key in values and (type(values[key]) is not int or values[key] < 1):
                raise SpecError(f"{key} is {values[key]!r}; expected a whole number from 1")
        columns = values["columns"]
        return cls(
            name,
            # columns that no task of ours compares with are null
            {key: task for key, task in columns.items() if task},
            tuple(_entry(entry, columns) for entry in values["entries"]),
            tuple(columns),
            values["about"],
            **{key: values[key] for key in SIZES if key in values},
        )

    def find(self, spec: str, task: str) -> float | None:
        """The number published for a row of ours, 0 to 1; None without one. Earlier entries win."""
        for entry in self.entries:
            for column, value in entry.values.items():
                if entry.spec == spec and self.tasks.get(column) == task and not entry.measured:
                    return value / 100
        return None

    def methods(self) -> list[str]:
        """All but the unpruned model, as ``method_of`` writes them."""
        return list(dict.fromkeys(entry.method for entry in self.entries if entry.budget is not None))

    def share(self, entry: Entry) -> float | None:
        """The part of the tokens that an entry keeps; None without a budget, or where it cannot be told."""
        budget = entry.budget
        if budget is None or self.tokens is None:
            return None
        if isinstance(budget.keep, float):
            return budget.keep
        # so many of each crop, or of the whole picture
        return budget.keep * (self.crops if budget.scope == "crop" else 1) / self.tokens

    def retained(self, method: str, share: float) -> Retained | None:
        """What is published of a method that keeps a share of the tokens.

        Averages that are printed go before those made of columns, and these before those between two budgets.
        Numbers that were measured with this package are no part of it.
        """
        mine = [one for one in self.entries if one.method == method and not one.measured]
        here = [one for one in mine if (its := self.share(one)) and math.isclose(its, share, rel_tol=SAME)]
        # reversed: of two entries of one source the first one wins
        printed = {one.source: one.average for one in reversed(here) if one.average is not None}
        if printed:
            return Retained(printed, "table")
        derived = {one.source: mean for one in reversed(here) if (mean := self._mean(one)) is not None}
        if derived:
            return Retained(derived, "derived")
        between = dict(self._between(mine, share))
        return Retained(between, "interpolated") if between else None

    def _mean(self, entry: Entry) -> float | None:
        """Over the columns that the unpruned row of the same source has; None where fewer than three do."""
        dense = next(
            (one for one in self.entries if one.spec == "dense" and one.source == entry.source), None
        )
        if dense is None:
            return None
        ratios = [value / dense.values[key] for key, value in entry.values.items() if dense.values.get(key)]
        return 100 * fmean(ratios) if len(ratios) >= 3 else None

    def _between(self, entries: list[Entry], share: float) -> Iterator[tuple[str, float]]:
        """By source, for those that print a smaller and a larger budget not far from one another."""
        for source in dict.fromkeys(one.source for one in entries):
            # share -> average; reversed, as above
            known = {
                its: one.average
                for one in reversed(entries)
                if one.source == source and one.average is not None and (its := self.share(one))
            }
            for low, high in pairwise(sorted(known)):
                # on a logarithmic scale: halving the tokens is one step wherever it begins
                if low < share < high and high <= APART * low:
                    place = math.log(share / low) / math.log(high / low)
                    yield source, known[low] + place * (known[high] - known[low])


def shipped() -> list[str]:
    """Names of the tables of this package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def _entry(entry: Any, columns: Mapping[str, Any]) -> Entry:
    # all that are needed, and none that is not known
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
    for key in ("values", "ci", "measured"):
        if not isinstance(entry.get(key, {}), dict):
            raise SpecError(f"{entry['spec']}: {key} is {entry[key]!r}; expected a mapping")
    values, intervals = entry.get("values", {}), entry.get("ci", {})
    unknown = sorted({*values, *intervals} - set(columns))
    if unknown:
        raise SpecError(f"{entry['spec']}: {unknown} are no columns; expected some of {list(columns)}")
    for key, pair in intervals.items():
        if not isinstance(pair, list) or len(pair) != 2:
            raise SpecError(f"{entry['spec']}: the interval of {key} is {pair!r}; expected two numbers")
    ends = [end for pair in intervals.values() for end in pair]
    for value in [*values.values(), *ends, entry.get("average", 0)]:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise SpecError(f"{entry['spec']} has the value {value!r}; expected a number as printed")
    return Entry(**entry | {"ci": {key: tuple(pair) for key, pair in intervals.items()}})
