# SPDX-License-Identifier: Apache-2.0
"""Summary: from the records of one model on one task to one row per spec, with all that its table shows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...registry import get
from ...spec import parse
from ..answer.record import Record
from . import estimates
from .estimates import Difference, Flips, Interval, Table
from .seeds import budget_of, merge_seeds, query_aware

DENSE = "dense"
BLIND = "blind"
COSTS_MORE = 0.02  # of the tokens per layer: what differs by less is equal


@dataclass(frozen=True)
class Band:
    """The seeds that a row is the mean of, as specs, with their lowest and highest accuracy."""

    seeds: tuple[str, ...]
    low: float
    high: float


@dataclass(frozen=True)
class Worst:
    """The family that kept least of its dense accuracy; ``retained`` is None where dense scored 0."""

    family: str
    accuracy: float
    retained: float | None


@dataclass(frozen=True)
class Hard:
    """Accuracy on the questions that pooling to the same budget gets wrong."""

    n: int
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One spec of one model on one task: a row of ``results.json``.

    A new metric is a field here, a value in ``summarise``, and a column in ``report/columns.py``.

    Args:
        keep: the budget as written; None without one.
        n, clusters: questions counted, and the sets of pictures that they show, which the intervals are over.
        pictures: pictures per question, of the questions that show any.
        realised_tokens, dense_tokens: visual tokens per question, read and unpruned.
        layer_tokens: the same as a mean over the decoder layers.
        retained: accuracy as a share of the dense one.
        query_aware: whether a method looks at the question to choose tokens.
        vs_dense, vs_random: paired differences; to random tokens of the same budget.
        vs_random_equal: the same to random tokens that cost as many tokens per layer, where the budget of a
            method says fewer than its layers read.
        families, groups: accuracy by kind of question; families also where they do not count.
        agreement: share of questions with the same answer as dense.
        on_object: share of the kept tokens on what is asked about.
        mdd: the smallest difference to dense that would have been found.
        firings, empty, failed: of the hooks; answers without a word; generations without an answer.
        answers: that these are counted in: of all families, and of all seeds of a mean.
        fingerprint: the cell that holds the answers; None for a mean over seeds.
        paper: the published accuracy. official: the task's own numbers.
    """

    model: str
    task: str
    spec: str
    method: str
    calibrated: bool = False
    query_aware: bool = False
    keep: str | None = None
    realised_tokens: float
    dense_tokens: float | None = None
    layer_tokens: float | None = None
    pictures: float | None = None
    on_object: float | None = None
    firings: int
    empty: int
    positions: str = ""
    encoding: str = ""
    n: int
    clusters: int | None = None
    accuracy: float
    ci: Interval
    families: Mapping[str, float]
    groups: Mapping[str, float] = field(default_factory=dict)
    worst: Worst | None = None
    retained: float | None = None
    vs_dense: Difference | None = None
    vs_random: Difference | None = None
    vs_random_equal: Difference | None = None
    flips: Flips | None = None
    agreement: float | None = None
    hard: Hard | None = None
    mdd: float | None = None
    band: Band | None = None
    failed: int = 0
    answers: int | None = None
    fingerprint: str | None = None
    paper: float | None = None
    official: Mapping[str, Any] | None = None

    @property
    def setting(self) -> tuple[str, str]:
        """Model and task: rows with the same setting are compared."""
        return self.model, self.task


@dataclass(frozen=True)
class Headline:
    """What the accuracies of one model on one task are over.

    Args:
        families: those that count. excluded: the others, and why.
        blind: accuracy of the best guess without a look at the picture, by family.
        chance: the same over the questions that count.
    """

    model: str
    task: str
    families: tuple[str, ...]
    excluded: Mapping[str, str]
    blind: Mapping[str, float] = field(default_factory=dict)
    chance: float | None = None


@dataclass(frozen=True)
class Summary:
    """Rows in the order in which specs were first met, means over seeds last."""

    rows: tuple[Row, ...]
    headline: Headline


def summarise(
    records: Iterable[Record],
    blind: Mapping[str, float],
    *,
    model: str = "",
    task: str = "",
    pictures: Mapping[str, int] | None = None,
    matched: Mapping[str, str] | None = None,
    resamples: int = estimates.RESAMPLES,
    seed: int = 0,
) -> Summary:
    """Rows of one model on one task.

    Accuracies, intervals, differences, flips and the hard slice are over the headline families: those in
    which the dense model beats a blind guesser (``blind``) clearly. Where it has learnt none, all families
    count and ``headline.families`` is empty. Specs that differ in their seed get one more row, their mean
    with a band. p-values are corrected over all rows of the table, of all budgets, but for the single seeds,
    which are compared with nothing.

    Args:
        records: of ``"dense"`` and of others, all on the same questions.
        pictures: how many pictures each question shows, by its id.
        matched: for specs without a budget, that of their baselines, which becomes their ``keep``.
    """
    held: dict[str, list[Record]] = {}
    for record in records:
        held.setdefault(record.spec, []).append(record)
    table = Table.of(record for mine in held.values() for record in mine)
    # raises where dense is missing, which all is compared with
    table.column(DENSE)
    inside, outside = estimates.headline(table, blind, DENSE)
    whole, bands = merge_seeds(table)
    # means over seeds first, so that both tables have the same columns
    table = whole.where(np.isin(whole.families, inside)) if inside else whole
    # seeds stand for their mean, which is tested in their place
    singles = {spec for specs in bands.values() for spec in specs}
    tested = [spec for spec in table.specs if spec != DENSE and spec not in singles]
    budgets = {spec: budget_of(spec) or (matched or {}).get(spec) for spec in table.specs}
    found = _Compared(
        whole,
        table,
        estimates.accuracy(table),
        estimates.differences(table, DENSE, tested, resamples=resamples, seed=seed),
        _against_random(table, {spec: budgets[spec] for spec in tested}, resamples, seed),
        _at_equal_cost(
            table, {spec: _read(held, bands, spec) for spec in (DENSE, *tested)}, budgets, resamples, seed
        ),
    )
    rows = []
    for spec in table.specs:
        seeds = bands.get(spec, [])
        # a mean over seeds is described by the records of all of them
        mine = [record for one in seeds or [spec] for record in held[one]]
        described = _described(spec, mine, pictures or {})
        described |= {"model": model, "task": task, "keep": budgets[spec]}
        rows.append(_row(spec, seeds, found, described))
    guesses = {family: float(blind[family]) for family in rows[0].families}
    # questions that count are all that table has by now
    chance = float(np.mean([blind[family] for family in table.families.tolist()]))
    return Summary(tuple(rows), Headline(model, task, tuple(inside), outside, guesses, chance))


@dataclass(frozen=True)
class _Compared:
    """What rows are read from; ``whole`` also has the families that do not count."""

    whole: Table
    counted: Table
    accuracy: Mapping[str, estimates.Estimate]
    vs_dense: Mapping[str, Difference]
    vs_random: Mapping[str, Difference]
    vs_random_equal: Mapping[str, Difference]


def _row(spec: str, seeds: Sequence[str], found: _Compared, described: dict[str, Any]) -> Row:
    table, mine = found.counted, found.accuracy[spec]
    return Row(
        **described,
        n=len(table),
        clusters=len(table.sums[1]),
        accuracy=mine.value,
        ci=(mine.low, mine.high),
        families=estimates.by(found.whole, "families", spec),
        groups=estimates.by(table, "groups", spec),
        worst=_worst(table, spec),
        retained=_ratio(mine.value, found.accuracy[DENSE].value),
        vs_dense=found.vs_dense.get(spec),
        vs_random=found.vs_random.get(spec),
        vs_random_equal=found.vs_random_equal.get(spec),
        # a mean over seeds has no answer to be right or wrong
        flips=None if seeds else estimates.flips(table, spec, DENSE),
        agreement=estimates.agreement(table, spec, DENSE),
        hard=_hard(table, spec, described["keep"]),
        mdd=found.vs_dense[spec].mdd if spec in found.vs_dense else None,
        band=_band([(one, found.accuracy[one].value) for one in seeds]),
    )


def _against_random(
    table: Table, budgets: Mapping[str, str | None], resamples: int, seed: int
) -> dict[str, Difference]:
    """Differences of specs to random tokens of their budgets, corrected together."""
    found: dict[str, Difference] = {}
    for budget in dict.fromkeys(budgets.values()):
        # the mean over its seeds, as merge_seeds names it
        random = f"random@{budget}"
        mine = [spec for spec, its in budgets.items() if its == budget and spec != random]
        if budget is not None and random in table.specs:
            found |= estimates.differences(table, random, mine, resamples=resamples, seed=seed)
    return _corrected(found)


def _corrected(found: Mapping[str, Difference]) -> dict[str, Difference]:
    """Over all budgets together: more rows are more chances to be lucky."""
    corrected = estimates.holm(np.array([one.p for one in found.values()]))
    return {
        spec: replace(one, p_holm=float(p)) for (spec, one), p in zip(found.items(), corrected, strict=True)
    }


def _at_equal_cost(
    table: Table, read: Mapping[str, float], budgets: Mapping[str, str | None], resamples: int, seed: int
) -> dict[str, Difference]:
    """Differences to random tokens at as many tokens per layer, for specs whose layers read more than those.

    Between two budgets of random, and above them the dense model, scores are taken on a line over the
    logarithm of the tokens; each question by itself, so that the difference stays a paired one.
    """
    names = dict.fromkeys(f"random@{budget}" for budget in budgets.values())
    # (tokens per layer, spec), ascending
    curve = sorted((read[name], name) for name in names if read.get(name))
    found: dict[str, Difference] = {}
    for spec, tokens in read.items():
        # what random reads at the budget of the spec
        own = read.get(f"random@{budgets[spec]}")
        if not own or tokens <= own * (1 + COSTS_MORE) or spec in names:
            continue
        below = [point for point in curve if point[0] <= tokens]
        above = [point for point in [*curve, (read[DENSE], DENSE)] if point[0] > tokens]
        # beyond the curve nothing can be said
        if not below or not above:
            continue
        (few, low), (many, high) = below[-1], above[0]
        place = math.log(tokens / few) / math.log(many / few)  # 0 at low, 1 at high
        scores = (1 - place) * table.of_spec(low) + place * table.of_spec(high)  # (n,)
        name = f"random at the cost of {spec}"
        with_it = replace(table, specs=(*table.specs, name), scores=np.column_stack([table.scores, scores]))
        found |= estimates.differences(with_it, name, [spec], resamples=resamples, seed=seed)
    return _corrected(found)


def _read(held: Mapping[str, Sequence[Record]], bands: Mapping[str, Sequence[str]], spec: str) -> float:
    """Tokens per layer of a spec, or of the seeds that it is the mean of, over samples with images."""
    mine = [record for one in bands.get(spec) or [spec] for record in held[one]]
    return float(np.mean([one.layer_tokens for one in mine if one.dense_tokens] or [0.0]))


def _described(spec: str, records: Sequence[Record], pictures: Mapping[str, int]) -> dict[str, Any]:
    """Fields of a row about what pruning did; token counts are over samples with images."""
    # where no sample has an image, all of them
    seen = [record for record in records if record.dense_tokens] or records
    asked = [record.on_object for record in records if record.on_object is not None]
    shown = [pictures[record.id] for record in seen if pictures.get(record.id)]
    parts = parse(spec).parts
    return {
        "spec": spec,
        "method": "+".join(part.name for part in parts),
        "calibrated": any(get(part.name).calibrated for part in parts),
        "query_aware": query_aware(spec),
        "realised_tokens": float(np.mean([record.realised_tokens for record in seen])),
        "dense_tokens": float(np.mean([record.dense_tokens for record in seen])),
        "layer_tokens": float(np.mean([record.layer_tokens for record in seen])),
        "pictures": float(np.mean(shown)) if shown else None,
        "on_object": float(np.mean(asked)) if asked else None,
        "firings": sum(record.firings for record in records),
        "empty": sum(record.empty for record in records),
        "answers": len(records),
        "positions": "/".join(sorted({record.positions for record in records})),
        "encoding": "/".join(sorted({record.encoding for record in records})),
    }


def _band(seeds: Sequence[tuple[str, float]]) -> Band | None:
    """Of specs with their accuracies."""
    if not seeds:
        return None
    values = [value for _, value in seeds]
    return Band(tuple(spec for spec, _ in seeds), min(values), max(values))


def _worst(table: Table, spec: str) -> Worst:
    """The family that retains least, or scores least where the dense model scores nothing."""
    mine, dense = estimates.by(table, "families", spec), estimates.by(table, "families", DENSE)
    shares = {family: _ratio(mine[family], dense[family]) for family in mine}
    # shares first; families without one come after all that lost something
    family = min(mine, key=lambda name: (1.0 if shares[name] is None else shares[name], mine[name]))
    return Worst(family, mine[family], shares[family])


def _hard(table: Table, spec: str, budget: str | None) -> Hard | None:
    """Accuracy on what pooling to the same budget gets wrong."""
    pooled = f"pool@{budget}"
    if pooled not in table.specs or spec == pooled:
        return None
    left = estimates.hard(table, pooled)
    return None if left is None else Hard(len(left), float(left.of_spec(spec).mean()))


def _ratio(value: float, of: float) -> float | None:
    return value / of if of else None
