# SPDX-License-Identifier: Apache-2.0
"""What a run must show before it is reported: all was answered, pruning happened, rows compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ...errors import EvaluationError
from ..leaderboard.rundir import Run, cell_id
from ..stats.summary import BLIND, DENSE, Row
from .load import AGAIN, Results, refuse, row_name

FREE = ("spec", "seeds", "plugins", "trained")  # all that the recipes of comparable rows may differ in
SILENT = 0.05  # share of empty answers above which a row is refused; of dense, none may be empty


class _Answered(NamedTuple):
    """What a row was asked, and how."""

    spec: str
    recipe: dict[str, Any]
    ids: set[str]


def check(run: Run) -> Results:
    """What a run holds; raises with every row that fails validation and what to do about it."""
    results = Results.of(run)
    refuse(f"{run.folder} cannot be reported", _problems(run, results.rows))
    return results


def _problems(run: Run, rows: Sequence[Row]) -> Iterator[str]:
    if not rows:
        yield "results.json has no rows; run the leaderboard"
    for row in rows:
        yield from _impossible(row)
        yield from _unbelievable(row)
    names = Counter((*row.setting, row.spec, row.band is None) for row in rows)
    for (model, task, spec, _), times in names.items():
        if times > 1:
            yield f"{spec!r} on {task!r} with {model!r} stands there {times} times; expected once"
    first: dict[tuple[str, str], _Answered] = {}  # (model, task) -> the first row of it
    unlike: list[str] = []
    for row in rows:
        if row.band is not None:  # a mean has no cell of its own
            continue
        name, cell = row_name(row), row.fingerprint
        if not cell:
            yield f"{name} names no cell, so its samples cannot be found; run the leaderboard again"
            continue
        try:
            recipe, samples = run.recipe(cell), run.journal(cell)
        except EvaluationError as error:
            yield f"{name}: {error}"
            # the other rows can still be looked at
            continue
        yield from _stale(row, cell, recipe, samples)
        answered = _Answered(row.spec, recipe, {sample["id"] for sample in samples})
        # every row is compared with the first of its model and task
        unlike += _incomparable(name, first.setdefault(row.setting, answered), answered)
    yield from unlike


def _impossible(row: Row) -> Iterator[str]:
    """Numbers that no run can give."""
    low, high = row.ci
    if not (0 <= row.accuracy <= 1 and 0 <= low <= high <= 1):
        given = f"accuracy {row.accuracy} with the interval [{low}, {high}]"
        yield f"{row_name(row)}: {given}; expected shares from 0 to 1, the lower end first; {AGAIN}"
    if row.n < 1 or row.realised_tokens < 0 or (row.layer_tokens or 0) < 0:
        given = f"n is {row.n}, tokens {row.realised_tokens} ({row.layer_tokens} by layer)"
        yield f"{row_name(row)}: {given}; expected at least one question and no negative counts; {AGAIN}"


def _unbelievable(row: Row) -> Iterator[str]:
    name = row_name(row)
    if row.failed:
        todo = 'see "error" in its journal, repair that, run again'
        yield f"{name}: {row.failed} of {row.n} generations failed; {todo}"
    # without a picture, saying nothing is an answer; now and then it is one of a model that lost too much
    answers = row.answers or row.n  # older results do not say
    silent = row.empty > (0 if row.spec == DENSE else SILENT * answers)
    if silent and row.method != BLIND:
        todo = "a model that says nothing was not measured: look why"
        yield f"{name}: {row.empty} of {answers} answers are empty; {todo}"
    if not row.firings and row.spec != DENSE:
        todo = "run `vlmprune verify` on the spec and the row again"
        yield f"{name}: no hook fired, so nothing shows that it pruned; {todo}"


def _stale(row: Row, cell: str, recipe: dict[str, Any], samples: list[dict[str, Any]]) -> Iterator[str]:
    """Whether a row says what its journal says."""
    name = row_name(row)
    if cell_id(recipe) != cell:
        found = f"the recipe in cells/{cell}.json has the fingerprint {cell_id(recipe)}"
        yield f"{name}: {found}; it was edited: run that row again"
    wrong = [key for key in ("spec", "model", "task") if recipe.get(key) != getattr(row, key)]
    if wrong:
        yield f"{name}: its cell {cell} has another {' and '.join(wrong)}; run the leaderboard again"
    if row.n > len(samples):  # families outside the headline are answered and not counted
        found = f"results.json counts {row.n} samples, its journal has {len(samples)}"
        yield f"{name}: {found}; run the leaderboard again"
    failed = sum(sample.get("error") is not None for sample in samples)
    empty = sum(sample.get("error") is None and not sample["answer"].strip() for sample in samples)
    firings = sum(sample["firings"] for sample in samples)
    counted = {"failed": (row.failed, failed), "empty": (row.empty, empty), "firings": (row.firings, firings)}
    stale = [f"{key} {said} but {is_} in its journal" for key, (said, is_) in counted.items() if said != is_]
    if stale:
        yield f"{name}: results.json says {', '.join(stale)}; it is stale: run the leaderboard again"


def _incomparable(name: str, known: _Answered, other: _Answered) -> Iterator[str]:
    """Whether a row differs from the first of its setting in more than its spec, or in its questions."""
    keys = {*other.recipe, *known.recipe} - set(FREE)
    differ = sorted(key for key in keys if other.recipe.get(key) != known.recipe.get(key))
    if differ:
        yield (
            f"{name} has a fingerprint that differs from that of {known.spec!r} in {differ}: they are not "
            "comparable; run both again with the same settings"
        )
    elif other.ids != known.ids:
        counts = f"answered {len(other.ids)} questions, {known.spec!r} {len(known.ids)}"
        yield f"{name} {counts}, not the same ones; run the leaderboard again"
