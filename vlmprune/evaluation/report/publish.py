# SPDX-License-Identifier: Apache-2.0
"""Rows of a run as entries of a published table: numbers, what they were measured with, no text of data sets.

Only what others can measure again is taken: all questions of a split, a checkpoint that its commit names,
methods of this package. Entries are put behind those that a file has; none is changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...errors import EvaluationError
from ...textfile import replace_text
from ..leaderboard.published import Published
from ..leaderboard.rundir import Run
from ..stats.summary import DENSE, Row
from .agreement import STAND_INS
from .check import check
from .judge import merged, ordered, task_names
from .load import Results, refuse, row_name
from .pivot import Across, across

NAMED = ("torch", "transformers", "numpy", "pillow", "tokenizers", "lmms_eval", "code")


@dataclass(frozen=True)
class Publishable:
    """What a run has for a table.

    Args:
        table: what it is put into, or an empty one.
        entries: plain values, as the file holds them. left_out: tasks that no column of the table is of.
    """

    table: Published
    entries: tuple[Mapping[str, Any], ...]
    left_out: tuple[str, ...]


def publishable(run: Run, table: Published | None = None) -> Publishable:
    """The entries of a run, which is checked as for a report; raises with all that speaks against it."""
    results = check(run)
    rows = merged(ordered(results.rows))
    models = sorted({row.model for row in rows})
    if len(models) > 1:
        raise EvaluationError(
            f"{run.folder} has rows of {models}; publish one checkpoint at a time: run it alone"
        )
    # a mean over seeds has no cell; those of its seeds differ in the seed alone
    recipes = [run.recipe(row.fingerprint) for row in results.rows if row.fingerprint]
    refuse(f"{run.folder} cannot be published", dict.fromkeys(_objections(models[0], recipes)))
    table = table or _empty(models[0], rows)
    # task -> column; of two columns of one task the first
    columns = {task: column for column, task in reversed(list(table.tasks.items()))}
    left_out = [task for task in dict.fromkeys(row.task for row in rows) if task not in columns]
    shown = [row for row in rows if row.task in columns]
    if not shown:
        raise EvaluationError(
            f"{run.folder} has the tasks {left_out}, and {table.name} columns of {list(table.tasks.values())}"
            ": none is in both; choose another file, or add a column to it"
        )
    known = _measured(run, results, models[0], recipes[0])
    entries = tuple(_entry(results, line, columns, known) for line in across(shown))
    return Publishable(table, entries, tuple(left_out))


def merge(path: Path, found: Publishable) -> int:
    """Put entries behind those of a file, or write a new one; returns how many were not there yet."""
    # the cells behind an entry say whether it is there: the same answers have the same names
    there = [entry.measured.get("cells") for entry in found.table.entries if entry.measured]
    new = [entry for entry in found.entries if entry["measured"]["cells"] not in there]
    if path.is_file():
        # the text of the file stays as it is, with its comments
        head = path.read_text(encoding="utf-8").rstrip("\n") + "\n"
    else:
        head = _head(found.table)
    text = head + as_yaml(new)
    try:
        # read again as a whole: lines that land under another key would be lost, or mean something else
        whole = Published.of(path.name, yaml.safe_load(text))
    except yaml.YAMLError:
        whole = None
    before = len(found.table.entries)
    if (
        whole is None
        or whole.entries[:before] != found.table.entries
        or len(whole.entries) != before + len(new)
    ):
        raise EvaluationError(
            f"{path}: entries cannot be put at its end; expected `entries:` as its last key, with a list "
            "below it whose lines begin with two spaces and a dash"
        )
    if new:
        replace_text(path, text)
    return len(new)


def as_yaml(entries: Sequence[Mapping[str, Any]]) -> str:
    """Lines of the list ``entries``."""
    if not entries:
        return ""
    # None: {a: 1} on one line where no value is a mapping or a list
    text = yaml.safe_dump(
        [dict(one) for one in entries], sort_keys=False, default_flow_style=None, width=10_000
    )
    return "".join(f"  {line}\n" for line in text.splitlines())


def _head(table: Published) -> str:
    columns = "".join(f"  {column}: {task}\n" for column, task in table.tasks.items())
    return f"about: {table.about}\ntokens: {table.tokens}\ncolumns:\n{columns}entries:\n"


def _empty(model: str, rows: Sequence[Row]) -> Published:
    """A table with a column for each task of a run."""
    names = task_names(row.task for row in rows)
    dense = next(row for row in rows if row.spec == DENSE)
    # of one picture, as the budgets of the table count
    tokens = max(1, round((dense.dense_tokens or 1) / (dense.pictures or 1)))
    tasks = {name: task for task, name in names.items()}
    return Published(f"{model.rpartition('/')[2]}.yaml", tasks, (), tuple(tasks), model, tokens)


def _objections(model: str, recipes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Why others could not measure the same."""
    if model in STAND_INS:
        yield f"{model!r} is a model of the package, and no checkpoint that a table is of; expected an HF id"
        return
    for recipe in recipes:
        weights = str(recipe.get("weights"))
        # as identity.weights writes what comes from the hub
        if not weights.startswith("commit "):
            yield (
                f"the weights of {model!r} are {weights!r}, which nobody else can find; expected an HF id, "
                "whose commit names them, in the config"
            )
        if recipe.get("limit") is not None:
            yield (
                f"{recipe['task']!r} was asked {recipe['limit']} questions; expected all of a split: leave "
                "out the limit and run again"
            )
        for name in recipe.get("plugins") or ():
            yield f"the method {name!r} does not come with the package; publish it first, or leave it out"


def _measured(run: Run, results: Results, model: str, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What all rows of a run were measured with."""
    known, generation = results.provenance, recipe.get("generation") or {}
    versions = recipe.get("versions") or {}
    hardware = known.get("hardware")
    device = hardware.get("accelerator") or hardware.get("processor") if isinstance(hardware, dict) else None
    return {
        "model": model,
        "weights": recipe["weights"],
        "vlmprune": str(versions.get("vlmprune") or run.info.get("version")),
        **{name: str(versions[name]) for name in NAMED if name in versions},
        "split": recipe.get("split"),
        "dtype": generation.get("dtype"),
        "batch_size": generation.get("batch_size"),
        "device": device or generation.get("device"),
        "date": known.get("date"),
    }


def _entry(
    results: Results, line: Across, columns: Mapping[str, str], known: Mapping[str, Any]
) -> dict[str, Any]:
    rows = {columns[task]: row for task, row in line.rows.items()}
    entry: dict[str, Any] = {
        "spec": line.spec,
        "source": f"measured with vlmprune {known['vlmprune']}",
        "values": {column: round(100 * row.accuracy, 2) for column, row in rows.items()},
        "ci": {column: [round(100 * end, 2) for end in row.ci] for column, row in rows.items()},
    }
    if line.retained is not None:
        entry["average"] = round(100 * line.retained, 2)
    entry["note"] = f"95 % intervals over sets of pictures; average over {len(rows)} of the columns"
    cells = sorted(cell for row in rows.values() for cell in _cells(results, row))
    asked = {column: row.n for column, row in rows.items()}
    entry["measured"] = {**known, "questions": asked, "cells": cells}
    return entry


def _cells(results: Results, row: Row) -> list[str]:
    """Fingerprints of the answers behind a row."""
    if row.fingerprint:
        return [row.fingerprint]
    seeds = row.band.seeds if row.band else ()
    found = [one.fingerprint for one in results.rows if one.setting == row.setting and one.spec in seeds]
    if not found or not all(found):
        raise EvaluationError(f"{row_name(row)} names no cells of its seeds; run the leaderboard again")
    return [cell for cell in found if cell]
