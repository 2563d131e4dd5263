# SPDX-License-Identifier: Apache-2.0
"""Agreement: whether a run ranks methods as published tables of a real model do, at each budget.

Only orders are compared: a small model loses other amounts than a large one. Both sides are shares of the
unpruned accuracy, ours over the tasks of the run, theirs over those of the papers. Numbers of several papers
were not made with one protocol, so pairs of methods that stand in one table are counted apart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path, PurePath
from statistics import fmean

from ...errors import EvaluationError
from ...spec import parse
from ..leaderboard.published import SAME, Published, Retained, shipped
from ..stats.ranks import RankAgreement, rank_agreement
from ..stats.seeds import method_of, query_aware
from ..stats.summary import DENSE, Row
from .judge import BASELINES, merged
from .load import Results
from .pivot import Across, across

# models of the package have no tables of their own; these are what they are small pictures of
STAND_INS = {"tiny": "llava-1.5-7b", "natural": "llava-1.5-7b"}
CLEAR = 2.0  # points of % of dense: methods that print sets further apart have an order there
DESIGNED = Path(__file__).parents[1] / "tasks" / "scenes" / "designed_with.json"


@dataclass(frozen=True)
class Standing:
    """A method here and in print.

    Args:
        designed: whether the model was designed with it; None where no list says.
        ours: accuracy in % of the unpruned one. published: the same in print, of these sources.
        by_seed: ours under each seed, where it is a mean over several.
    """

    spec: str
    method: str
    query_aware: bool
    designed: bool | None
    ours: float
    published: float
    sources: Retained
    by_seed: tuple[float, ...] = ()


@dataclass(frozen=True)
class Swapped:
    """Two methods that stand the other way round here: ``above`` is the better one in print.

    Args:
        published, ours: points of % of dense by which ``above`` is better there, and worse here.
    """

    above: str
    below: str
    published: float
    ours: float


@dataclass(frozen=True)
class Agreement:
    """One model at one budget beside one table; or the mean over seeds of a model.

    Args:
        share: of the tokens that stay. keep: as the run writes it.
        whole, designed_with, held_out: of all methods, of those that the model was designed with, of the
            others; None where there are too few.
        pairs: of methods. swapped: those that stand the other way round, the clearest in print first.
        one_table: pairs that some table prints side by side: those the other way round here, and all of them.
        clear, close: the same of pairs that are at least ``CLEAR`` points apart in print, and of all others.
        unpublished: specs of the run that no table has at this budget.
        seeds: runs that it is the mean of.
    """

    model: str
    table: str
    keep: str
    share: float
    standings: tuple[Standing, ...]
    whole: RankAgreement | None
    designed_with: RankAgreement | None
    held_out: RankAgreement | None
    pairs: int
    swapped: tuple[Swapped, ...]
    one_table: tuple[int, int]
    clear: tuple[int, int]
    close: tuple[int, int]
    unpublished: tuple[str, ...]
    seeds: int = 1


def reference(model: str, named: object = None) -> Published | None:
    """The table that a model is compared with: the one its config names, if it comes with the package, else
    that of the model which it stands for.
    """
    # from a results.json, which may hold anything there
    stem = PurePath(named).stem if isinstance(named, str) else None
    name = stem if stem in shipped() else STAND_INS.get(model)
    return None if name is None else Published.shipped(name)


def agreements(rows: Sequence[Row], tables: Mapping[str, Published]) -> list[Agreement]:
    """One for each model that has a table, and each budget of the run of which something is published."""
    found = []
    for model, table in tables.items():
        mine = merged([row for row in rows if row.model == model])
        # share of the tokens -> lines of it, with the budget as written
        budgets: dict[float, list[tuple[Across, str]]] = {}
        for line in across(mine):
            # of the first task that it answered: its budget is the same on all
            share = _share(next(iter(line.rows.values())))
            if share is None or line.method in BASELINES or line.retained is None:
                continue
            # 48 of 144 and 0.333 are one budget
            at = next((one for one in budgets if math.isclose(one, share, rel_tol=SAME)), share)
            budgets.setdefault(at, []).append((line, str(line.keep)))
        found += [
            _compare(model, table, share, lines) for share, lines in sorted(budgets.items(), reverse=True)
        ]
    return [one for one in found if one.standings]


def as_seeds(runs: Mapping[str, Results]) -> dict[str, list[Row]]:
    """Rows of runs that are seeds of one model, all under the name that it has in the first."""
    names = {run: sorted({row.model for row in results.rows}) for run, results in runs.items()}
    tasks = {run: sorted({row.task for row in results.rows}) for run, results in runs.items()}
    first = next(iter(runs))
    for run in runs:
        if len(names[run]) != 1:
            raise EvaluationError(
                f"{run} has the models {names[run]}; expected one: several runs are seeds of one model"
            )
        if tasks[run] != tasks[first]:
            raise EvaluationError(
                f"{run} has the tasks {tasks[run]} and {first} has {tasks[first]}; expected the same"
            )
    return {run: [replace(row, model=names[first][0]) for row in runs[run].rows] for run in runs}


def over_seeds(runs: Mapping[str, Sequence[Agreement]]) -> list[Agreement]:
    """The mean over runs that are seeds of one model, by budget; they must have answered the same specs."""
    first = next(iter(runs))
    specs = {run: _compared(found) for run, found in runs.items()}
    for run in runs:
        unlike = sorted(specs[first] ^ specs[run])
        if unlike:
            raise EvaluationError(
                f"of {first} and {run} only one has {unlike[:4]}; seeds are averaged over the same specs: "
                "run both with one config"
            )
    means = []
    for of_one_budget in zip(*runs.values(), strict=True):
        known = [{one.spec: one for one in found.standings} for found in of_one_budget]
        model = of_one_budget[0]
        standings = []
        for one in model.standings:
            by_seed = tuple(of[one.spec].ours for of in known)
            standings.append(replace(one, ours=fmean(by_seed), by_seed=by_seed))
        means.append(
            _ranked_at(
                standings,
                model.model,
                model.table,
                keep=model.keep,
                share=model.share,
                unpublished=model.unpublished,
                seeds=len(runs),
            )
        )
    return means


def _compared(found: Sequence[Agreement]) -> set[str]:
    return {one.spec for budget in found for one in budget.standings}


def tables_of(results: Results) -> dict[str, Published]:
    """By model, for those that have one."""
    named = results.provenance.get("published")
    models = dict.fromkeys(row.model for row in results.rows)
    return {model: table for model in models if (table := reference(model, named)) is not None}


@cache
def designed_with() -> dict[str, tuple[str, ...]]:
    """Methods that each model of the package was designed with."""
    values = json.loads(DESIGNED.read_text(encoding="utf-8"))
    return {model: tuple(halves["designed_with"]) for model, halves in values.items()}


def _share(row: Row) -> float | None:
    """The part of the tokens of a picture that a row keeps, as its budget says it."""
    budgets = [part.budget for part in parse(row.spec).parts if part.budget is not None]
    if row.spec == DENSE or not budgets or not row.dense_tokens:
        return None
    budget = budgets[-1]
    if isinstance(budget.keep, float):
        return budget.keep
    if budget.scope == "image":
        # by the tokens of one picture: a question may show several
        return budget.keep / (row.dense_tokens / (row.pictures or 1))
    # how many crops a picture had is not in a row
    return row.realised_tokens / row.dense_tokens


def _compare(model: str, table: Published, share: float, lines: Sequence[tuple[Across, str]]) -> Agreement:
    standings, unpublished = [], []
    halves = designed_with().get(model)
    for line, _ in lines:
        method = method_of(line.spec)
        sources = table.retained(method, share)
        if sources is None or line.retained is None:
            unpublished.append(line.spec)
            continue
        designed = None if halves is None else method in halves  # not known without a list
        ours = 100 * line.retained
        aware = query_aware(line.spec)
        standings.append(Standing(line.spec, method, aware, designed, ours, sources.value, sources))
    standings.sort(key=lambda one: -one.published)
    # of several spellings of one budget, such as 48 and 0.333, the shortest
    keep = min((keep for _, keep in lines), key=len)
    return _ranked_at(
        standings, model, table.name.removesuffix(".yaml"), keep=keep, share=share, unpublished=unpublished
    )


def _ranked_at(
    standings: Sequence[Standing],
    model: str,
    table: str,
    *,
    keep: str,
    share: float,
    unpublished: Sequence[str],
    seeds: int = 1,
) -> Agreement:
    """``standings`` in the order of print."""
    pairs = list(combinations(standings, 2))
    clear = [(above, below) for above, below in pairs if above.published - below.published >= CLEAR]
    swapped = _swapped(pairs)
    wrong = len(_swapped(clear))
    return Agreement(
        model,
        table,
        keep,
        share,
        tuple(standings),
        _ranked(standings),
        _ranked([one for one in standings if one.designed]),
        _ranked([one for one in standings if one.designed is False]),  # None belongs to neither half
        len(pairs),
        tuple(swapped),
        _one_table(pairs),
        (wrong, len(clear)),
        (len(swapped) - wrong, len(pairs) - len(clear)),
        tuple(unpublished),
        seeds,
    )


def _ranked(standings: Sequence[Standing]) -> RankAgreement | None:
    # by seed, then by method; nothing where there is one seed
    seeds = list(zip(*(one.by_seed for one in standings), strict=True))
    ours, theirs = [one.ours for one in standings], [one.published for one in standings]
    return rank_agreement(ours, theirs, seeds=seeds)


def _swapped(pairs: Iterable[tuple[Standing, Standing]]) -> list[Swapped]:
    found = []
    for above, below in pairs:  # standings are in the order of print
        # both positive: the better one in print is the worse one here
        printed, here = above.published - below.published, below.ours - above.ours
        if printed > 0 and here > 0:
            found.append(Swapped(above.method, below.method, printed, here))
    return sorted(found, key=lambda one: -one.published)


def _one_table(pairs: Iterable[tuple[Standing, Standing]]) -> tuple[int, int]:
    swapped = total = 0
    for first, second in pairs:
        a, b = first.sources.by_source, second.sources.by_source
        gaps = [a[source] - b[source] for source in a if source in b]
        # where the mean gap is 0, print has no order
        if gaps and (printed := fmean(gaps)):
            total += 1
            # opposite signs
            swapped += printed * (first.ours - second.ours) < 0
    return swapped, total
