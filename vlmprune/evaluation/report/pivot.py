# SPDX-License-Identifier: Apache-2.0
"""Methods x tasks: accuracies of each spec on all tasks of a model, their average, and its share of dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from ..stats.summary import Row
from .judge import merged, ordered, task_names
from .table import Column
from .text import NOTHING, interval, ratio


@dataclass(frozen=True)
class Across:
    """One spec on all tasks.

    Args:
        rows: by task; a task that the spec could not answer is missing.
        average: unweighted mean of the accuracies; None where a task is missing.
        retained: mean of the accuracies as shares of the dense ones, as papers give it; None also where dense
            scored 0 on a task.
    """

    spec: str
    keep: str | None
    method: str
    rows: Mapping[str, Row]
    average: float | None
    retained: float | None


@dataclass(frozen=True)
class Pivot:
    """The table of one model; ``tasks`` in the order of the config."""

    model: str
    tasks: tuple[str, ...]
    lines: tuple[Across, ...]

    @cached_property
    def names(self) -> dict[str, str]:
        """Headings of the tasks."""
        return task_names(self.tasks)

    @property
    def sizes(self) -> str:
        """Questions of each task, for a caption: "gqa (n = 1000), pope (n = 500)"."""
        counts = {task: line.rows[task].n for line in self.lines for task in self.tasks if task in line.rows}
        return ", ".join(f"{self.names[task]} (n = {counts[task]})" for task in self.tasks)

    def columns(self, intervals: bool = False) -> list[Column[Across]]:
        """A column for each task between the spec and the averages."""
        return [
            Column(
                "spec",
                title="spec",
                hint="what was run, as it is given to vlmprune",
                value=lambda line: line.spec,
                text=lambda line: line.spec,
                left=True,
            ),
            *(self._task(task, intervals) for task in self.tasks),
            Column(
                "average",
                title="average",
                hint="unweighted mean over the tasks",
                value=lambda line: line.average,
                text=lambda line: ratio(line.average),
                wins=True,
            ),
            Column(
                "retained",
                title="% of dense",
                hint="mean over the tasks of the accuracy as a percentage of the dense one",
                value=lambda line: line.retained,
                text=lambda line: ratio(line.retained),
                wins=True,
            ),
        ]

    def _task(self, task: str, intervals: bool) -> Column[Across]:
        def text(line: Across) -> str:
            row = line.rows.get(task)
            if row is None:
                return NOTHING
            return f"{ratio(row.accuracy)} {interval(row.ci)}" if intervals else ratio(row.accuracy)

        return Column(
            task,
            title=self.names[task],
            hint=f"accuracy on {task}, %",
            value=lambda line: line.rows[task].accuracy if task in line.rows else None,
            text=text,
            wins=True,
        )


def pivots(rows: Sequence[Row]) -> list[Pivot]:
    """One table per model that answered more than one task; single seeds are left out."""
    found = []
    for model in dict.fromkeys(row.model for row in rows):
        mine = ordered(merged([row for row in rows if row.model == model]))
        tasks = tuple(dict.fromkeys(row.task for row in mine))
        if len(tasks) > 1:
            found.append(Pivot(model, tasks, tuple(across(mine))))
    return found


def across(rows: Sequence[Row]) -> list[Across]:
    """The rows of one model, one line for each spec, whether there is one task or several."""
    tasks = tuple(dict.fromkeys(row.task for row in rows))
    specs: dict[str, dict[str, Row]] = {}  # spec -> task -> row
    for row in rows:
        specs.setdefault(row.spec, {})[row.task] = row
    lines = []
    for spec, by_task in specs.items():
        known = next(iter(by_task.values()))  # budget and method are the same on all tasks
        # a mean over fewer tasks would not compare with those of other rows
        average, retained = None, None
        if len(by_task) == len(tasks):
            average = fmean(row.accuracy for row in by_task.values())
            shares = [row.retained for row in by_task.values() if row.retained is not None]
            retained = fmean(shares) if len(shares) == len(tasks) else None
        lines.append(Across(spec, known.keep, known.method, by_task, average, retained))
    budgets = list(dict.fromkeys(line.keep for line in lines))  # a spec that lacks the first task came late
    return sorted(lines, key=lambda line: budgets.index(line.keep))
