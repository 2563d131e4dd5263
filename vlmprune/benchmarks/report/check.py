# SPDX-License-Identifier: Apache-2.0
"""What a run must show before it is reported: that every row was answered, that pruning happened, that rows are comparable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from ...errors import EvaluationError
from ..rundir import Run, cell_id

NEEDED = ("spec", "model", "task", "n", "accuracy", "ci", "families", "realised_tokens", "failed", "empty", "firings")
FREE = ("spec", "seeds", "plugins")  # all that the recipes of comparable rows may differ in


class _Answered(NamedTuple):
    """What a row was asked, and how."""

    spec: str
    recipe: dict[str, Any]
    ids: set[str]


def check(run: Run) -> None:
    """Raise with every row that cannot be believed and what to do about it."""
    problems = list(_problems(run))
    if problems:
        shown = [f"  {text}" for text in problems[:20]] + [f"  and {len(problems) - 20} more"] * (len(problems) > 20)
        raise EvaluationError(f"{run.folder} cannot be reported, {len(problems)} problems:\n" + "\n".join(shown))


def row_name(row: dict[str, Any]) -> str:
    """For messages."""
    return f"{row.get('spec')!r} on {row.get('task')!r} with {row.get('model')!r}"


def _problems(run: Run) -> Iterator[str]:
    if not run.rows:
        yield "results.json has no rows; run the leaderboard"
    whole = []
    for row in run.rows:
        missing = [key for key in NEEDED if row.get(key) is None]
        if missing:
            yield f"{row_name(row)} lacks {missing}; run the leaderboard again, it recomputes results.json"
            continue
        whole.append(row)
        yield from _unbelievable(row)
    names = Counter((row["model"], row["task"], row["spec"], row.get("band") is None) for row in whole)
    for (model, task, spec, _), count in names.items():
        if count > 1:
            yield f"{spec!r} on {task!r} with {model!r} stands there {count} times; expected once"
    cells = [row for row in whole if row.get("band") is None]
    first: dict[tuple[str, str], _Answered] = {}
    unlike = []
    for row in cells:
        name, cell = row_name(row), row.get("fingerprint")
        if not cell:
            yield f"{name} names no cell, so its samples cannot be found; run the leaderboard again"
            continue
        try:
            recipe, samples = run.recipe(cell), run.journal(cell)
        except EvaluationError as error:
            yield f"{name}: {error}"
            continue
        yield from _stale(row, recipe, samples)
        answered = _Answered(row["spec"], recipe, {sample["id"] for sample in samples})
        unlike += _incomparable(name, first.setdefault((row["model"], row["task"]), answered), answered)
    yield from unlike


def _unbelievable(row: dict[str, Any]) -> Iterator[str]:
    name = row_name(row)
    if row["failed"]:
        yield f'{name}: {row["failed"]} of {row["n"]} generations failed; see "error" in its journal, repair that, run again'
    if row["empty"]:
        yield f"{name}: {row['empty']} of {row['n']} answers are empty; a model that says nothing was not measured: look why"
    if not row["firings"] and row["spec"] != "dense":
        yield f"{name}: no hook fired, so nothing shows that it pruned; run `vlmprune verify` on the spec and the row again"


def _stale(row: dict[str, Any], recipe: dict[str, Any], samples: list[dict[str, Any]]) -> Iterator[str]:
    """Whether a row says what its journal says."""
    name, cell = row_name(row), row["fingerprint"]
    if cell_id(recipe) != cell:
        yield f"{name}: the recipe in cells/{cell}.json has the fingerprint {cell_id(recipe)}; it was edited: run that row again"
    wrong = [key for key in ("spec", "model", "task") if recipe.get(key) != row[key]]
    if wrong:
        yield f"{name}: its cell {cell} has another {' and '.join(wrong)}; run the leaderboard again"
    twice = [each for each, count in Counter(sample["id"] for sample in samples).items() if count > 1]
    if twice:
        yield f"{name}: the journal {cell} has sample {twice[0]!r} twice; delete the journal and run that row again"
    if row["n"] > len(samples):  # families outside the headline are answered and not counted
        yield f"{name}: results.json counts {row['n']} samples, its journal has {len(samples)}; run the leaderboard again"
    counted = {
        "failed": sum(sample.get("error") is not None for sample in samples),
        "empty": sum(sample.get("error") is None and not sample["answer"].strip() for sample in samples),
        "firings": sum(sample["firings"] for sample in samples),
    }
    stale = [f"{key} {row[key]} but {value} in its journal" for key, value in counted.items() if row[key] != value]
    if stale:
        yield f"{name}: results.json says {', '.join(stale)}; it is stale: run the leaderboard again"


def _incomparable(name: str, known: _Answered, other: _Answered) -> Iterator[str]:
    """Whether a row differs in more than its spec from the first of its model and task, or answered other questions."""
    differ = sorted(key for key in {*other.recipe, *known.recipe} - set(FREE) if other.recipe.get(key) != known.recipe.get(key))
    if differ:
        yield (
            f"{name} has a fingerprint that differs from that of {known.spec!r} in {differ}: they are not comparable; "
            "run both again with the same settings"
        )
    elif other.ids != known.ids:
        counts = f"answered {len(other.ids)} questions, {known.spec!r} {len(known.ids)}"
        yield f"{name} {counts}, not the same ones; run the leaderboard again"
