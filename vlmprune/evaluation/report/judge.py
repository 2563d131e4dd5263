# SPDX-License-Identifier: Apache-2.0
"""Which rows belong together, in which order they stand, and the few judgements that are made about one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Literal

from ..stats.estimates import Difference
from ..stats.summary import BLIND, DENSE, Row

BASELINES = ("random", "uniform", "pool", "downsample", BLIND)
LEVEL = 0.05
Side = Literal["better", "no different", "worse"]


def series(spec: str) -> str:
    """A spec without its budgets: the curve that a row belongs to."""
    return re.sub(r"@[^+]*", "", spec)  # "debias@0.5+fastv@64" -> "debias+fastv"


def settings(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """Models and tasks in the order of the rows, which is that of the config."""
    return list(dict.fromkeys(row.setting for row in rows))


def task_names(tasks: Iterable[str]) -> dict[str, str]:
    """Short names for headings: "lmms:tasks/gqa.yaml" -> "gqa", unless two tasks would be called the same."""
    # "lmms:" is no part of the path; paths have slashes on every system
    short = {task: PurePosixPath(task.rpartition(":")[2]).name.removesuffix(".yaml") for task in tasks}
    names = list(short.values())
    return {task: name if names.count(name) == 1 else task for task, name in short.items()}


def is_seed(row: Row, rows: Iterable[Row]) -> bool:
    """Whether this is one seed of a row that is merged over seeds."""
    return any(
        other.band is not None and other.setting == row.setting and row.spec in other.band.seeds
        for other in rows
    )


def merged(rows: Sequence[Row]) -> list[Row]:
    """Without the single seeds of rows that are means over seeds."""
    # a seed is one within its model and task only
    seeds = {(*row.setting, seed) for row in rows if row.band for seed in row.band.seeds}
    return [row for row in rows if (*row.setting, row.spec) not in seeds]


def ordered(rows: Sequence[Row]) -> list[Row]:
    """Models and tasks as in the config; dense, then budgets from many tokens to few, baselines first."""
    place = {setting: number for number, setting in enumerate(settings(rows))}
    budgets: dict[tuple[object, object], float] = {}
    for row in rows:
        key = (row.setting, row.keep)
        # rows of a budget read slightly different counts; the largest places them together
        budgets[key] = max(budgets.get(key, 0.0), row.realised_tokens)

    def rank(row: Row) -> tuple[object, ...]:
        baseline = BASELINES.index(row.method) if row.method in BASELINES else len(BASELINES)
        tokens = budgets[row.setting, row.keep]
        # dense, then by tokens; str, since keep may be None
        kind = (row.spec != DENSE, -tokens, str(row.keep), baseline)
        return (place[row.setting], *kind, row.spec, row.band is None)

    return sorted(rows, key=rank)


def side(against: Difference) -> Side:
    """Only a difference whose interval leaves out zero and that survives the correction counts."""
    low, high = against.ci
    # both are asked for: an interval is not corrected for the number of rows
    if against.p_holm >= LEVEL or low <= 0 <= high:
        return "no different"
    return "better" if low > 0 else "worse"


def badges(row: Row, rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(kind, text) of what may be said about a row: only claims that its intervals support."""
    found = []
    if row.method in BASELINES:
        found.append(("baseline", "baseline"))
    if is_best(row, rows):
        found.append(("best", f"best at {row.keep}"))
    verdict = side(row.vs_random) if row.vs_random else "no different"
    if verdict == "better":
        found.append(("good", "beats random"))
    if verdict == "worse":
        found.append(("bad", "below random"))
    if row.band:
        found.append(("note", f"{len(row.band.seeds)} seeds"))
    if row.calibrated:
        found.append(("note", "calibrated"))
    return found


def is_best(row: Row, rows: Sequence[Row]) -> bool:
    """Whether the interval of a row lies above those of all other rows with the same budget."""
    if row.keep is None or row.spec == DENSE or is_seed(row, rows):
        return False
    rivals = [
        other
        for other in merged(rows)
        if other is not row and other.setting == row.setting and other.keep == row.keep
    ]
    return bool(rivals) and row.ci[0] > max(other.ci[1] for other in rivals)
