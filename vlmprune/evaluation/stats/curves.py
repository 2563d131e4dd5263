# SPDX-License-Identifier: Apache-2.0
"""Accuracy curves: what to run so that every method appears at every budget, and the points that follow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...api import prune
from ...errors import EvaluationError, SpecError, UnsupportedError
from ...plain import plain, read
from ...registry import get, list_methods, option_fields
from ...spec import parse
from ..answer.record import Record
from . import estimates
from .estimates import Table
from .seeds import query_aware, seedless
from .summary import DENSE, Headline, Row, summarise

KEEPS = (1.0, 0.5, 0.25, 0.125, 0.0625)
# what wrappers are put around: one method before the language model, one inside
BASES = ("fastervlm", "fastv")
# schedules that start early, for budgets that the default one cannot meet
EARLY = {"pyramiddrop": "pyramiddrop(layers=(1,2,3))"}
Values = tuple[float, float, float]  # accuracy, and the ends of its interval
Slices = Mapping[tuple[str, str], Table]  # by kind and name, such as ("families", "text")


@dataclass(frozen=True)
class Point:
    """A method at a budget: one spec, or several that differ in their seed."""

    label: str
    keep: float
    specs: tuple[str, ...]

    @property
    def name(self) -> str:
        """The spec of the row in a summary."""
        return self.specs[0] if len(self.specs) == 1 else seedless(self.specs[0])


def plan(
    model: Any,
    keeps: Sequence[float] = KEEPS,
    seeds: Sequence[int] = (0, 1, 2),
    methods: Sequence[str] | None = None,
) -> tuple[list[Point], dict[str, str]]:
    """Points for this model, the dense one first, and what is left out and why.

    Keeping all tokens is the dense model for every method (a conformance check), so 1.0 is one point.
    """
    points, skipped = [Point(DENSE, 1.0, (DENSE,))], {}
    for label in _labels(list_methods() if methods is None else methods):
        for keep in sorted({float(keep) for keep in keeps if keep < 1}, reverse=True):
            reason = ""
            # the first form that this model takes; the else below is for neither
            for text in (label, EARLY.get(label)):
                specs: tuple[str, ...] = ()  # stays empty where there is no early form
                try:
                    specs = _seeded(f"{text}@{keep}", seeds) if text else ()
                    for spec in specs:
                        prune(model, spec)  # attaches nothing: only asks
                except (SpecError, UnsupportedError) as error:
                    reason = reason or str(error)  # the default form says it best
                    continue
                if specs:
                    points.append(Point(label, keep, specs))
                    break
            else:
                skipped[f"{label}@{keep}"] = reason
    return points, skipped


def _labels(names: Sequence[str]) -> Iterator[str]:
    """What stands before the budget: wrappers and re-weighting methods need another method to cut."""
    for name in names:
        cls = get(name)
        if name == DENSE:
            continue
        if cls.wraps:
            yield from (f"{name}+{base}" for base in BASES)
        elif not cls.budgeted:
            yield f"{name}+{BASES[0]}"
        else:
            yield name


def _seeded(spec: str, seeds: Sequence[int]) -> tuple[str, ...]:
    parsed = parse(spec)
    # seeds are an option of the first part, as in random(seed=1)
    if not any(option.name == "seed" for option in option_fields(get(parsed.parts[0].name))):
        return (str(parsed),)
    name, _, budget = spec.partition("@")
    return tuple(str(parse(f"{name}(seed={seed})@{budget}")) for seed in seeds)


@dataclass(frozen=True)
class Accuracies:
    """(value, low, high) of a spec over all headline families, by group, and by family."""

    all: Mapping[str, Values]
    groups: Mapping[str, Values]
    families: Mapping[str, Values]


@dataclass(frozen=True)
class CurvePoint:
    """A row of the summary with its place on both abscissae: tokens kept, and tokens that layers read."""

    label: str
    share: float
    layer_share: float
    query_aware: bool
    accuracies: Accuracies
    row: Row


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A paired difference."""

    difference: float
    ci: estimates.Interval
    p: float


@dataclass(frozen=True, kw_only=True)
class Best(Gap):
    """The best method against random tokens."""

    label: str


@dataclass(frozen=True, kw_only=True)
class Needle(Gap):
    """Needles: the best method that reads the question against the best of the others."""

    query_aware: str
    other: str


@dataclass(frozen=True)
class Verdict:
    """What can be said at one budget; ``pool``: what pooling costs each family, the largest loss first."""

    keep: float
    best: Best | None = None
    pool: Mapping[str, Gap] | None = None
    needle: Needle | None = None


@dataclass(frozen=True)
class Curves:
    """Points, the dense one first, and what they say."""

    rows: tuple[CurvePoint, ...]
    headline: Headline
    at: Verdict

    def plain(self) -> dict[str, Any]:
        """For JSON; the row of a point is not nested."""
        rows = []
        for point in self.rows:
            values = plain(point)
            rows.append({**values.pop("row"), **values})
        return {"rows": rows, "headline": plain(self.headline), "at": plain(self.at)}

    @classmethod
    def read(cls, values: Mapping[str, Any], name: str) -> Curves:
        """What ``plain`` gave; ``name`` says in messages where it is from."""
        where = {"model": "", "task": ""}  # of a whole result, not of each row, in older files
        try:
            # a line has the fields of a point and those of its row side by side, and is read as both
            rows = [where | {**row, "row": where | row} for row in values["rows"]]
            headline, at = where | values["headline"], values["at"]
        except (KeyError, TypeError) as error:
            raise EvaluationError(
                f"{name} is no result of benchmarks/curves.py ({error!r}); measure again"
            ) from error
        points = (read(CurvePoint, row, f"{name}: row {number}") for number, row in enumerate(rows, 1))
        return cls(
            tuple(points), read(Headline, headline, f"{name}: headline"), read(Verdict, at, f"{name}: at")
        )


def curves(
    records: Iterable[Record],
    points: Sequence[Point],
    blind: Mapping[str, float],
    *,
    resamples: int = estimates.RESAMPLES,
) -> Curves:
    """One row per point, with an interval for each group and family, and what can be said at 12.5 %."""
    held = list(records)
    table = Table.of(held)
    summary = summarise(held, blind, resamples=resamples)
    summaries = {row.spec: row for row in summary.rows}
    # the same columns as in the summary: a mean where there are several seeds
    for point in points:
        if len(point.specs) > 1:
            table = table.merged(point.name, point.specs)
    slices = _slices(table, summary.headline.families)
    found = {key: estimates.accuracy(part) for key, part in slices.items()}
    rows = []
    for point in points:
        row = summaries[point.name]
        kinds: dict[str, dict[str, Values]] = {"all": {}, "groups": {}, "families": {}}
        for (kind, name), by_spec in found.items():
            one = by_spec[point.name]
            kinds[kind][name] = one.value, one.low, one.high
        share = row.layer_tokens / row.dense_tokens if row.layer_tokens and row.dense_tokens else 1.0
        accuracies = Accuracies(**kinds)
        rows.append(CurvePoint(point.label, point.keep, share, query_aware(point.label), accuracies, row))
    return Curves(tuple(rows), summary.headline, verdict(slices, points, resamples))


def _slices(table: Table, inside: Sequence[str]) -> Slices:
    """The headline families together and by group, and every family alone."""
    names = list(dict.fromkeys(table.families.tolist()))
    # where the model has learnt no family, all of them count
    whole = table.where(np.isin(table.families, inside or names))
    slices = {("all", "all"): whole}
    for group in dict.fromkeys(whole.groups.tolist()):
        slices["groups", group] = whole.where(whole.groups == group)
    for family in names:
        slices["families", family] = table.where(table.families == family)
    return slices


def verdict(
    slices: Slices, points: Sequence[Point], resamples: int = estimates.RESAMPLES, keep: float = 0.125
) -> Verdict:
    """At one budget: best against random, pooling by family, and needles with and without the question."""
    here = {point.label: point.name for point in points if point.keep == keep}
    # without baselines
    chosen = {label: name for label, name in here.items() if label not in ("random", "uniform", "pool")}
    if not chosen or "random" not in here:
        return Verdict(keep)
    whole = slices["all", "all"]
    best = max(chosen, key=lambda label: whole.of_spec(chosen[label]).mean())
    found = Verdict(keep, Best(label=best, **_gap(whole, chosen[best], here["random"], resamples)))
    # families alone that the headline counts
    learnt = {
        name: part for (kind, name), part in slices.items() if kind == "families" and name in whole.families
    }
    if "pool" in here:
        losses = {name: Gap(**_gap(part, here["pool"], DENSE, resamples)) for name, part in learnt.items()}
        # the largest loss is the most negative difference
        found = replace(found, pool=dict(sorted(losses.items(), key=lambda item: item[1].difference)))
    aware, blind = ([label for label in chosen if query_aware(label) is wanted] for wanted in (True, False))
    if "needle" in learnt and aware and blind:
        needle = learnt["needle"]
        a, b = (max(some, key=lambda label: needle.of_spec(chosen[label]).mean()) for some in (aware, blind))
        gap = _gap(needle, chosen[a], chosen[b], resamples)
        found = replace(found, needle=Needle(query_aware=a, other=b, **gap))
    return found


def _gap(table: Table, spec: str, reference: str, resamples: int) -> dict[str, Any]:
    """Fields of a ``Gap``."""
    one = estimates.differences(table, reference, [spec], resamples=resamples)[spec]
    return {"difference": one.difference, "ci": one.ci, "p": one.p}
