# SPDX-License-Identifier: Apache-2.0
"""Tasks by name: the built-in benchmarks, tasks of lmms-eval ("lmms:gqa"), and those of other packages.

Each is loaded when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from ...errors import EvaluationError, VlmPruneError, did_you_mean, reason
from ...lazytable import LazyTable
from .sample import Task

GROUP = "vlmprune.tasks"
LMMS = "lmms:"
# functions without arguments that return the task
_BUILTIN = {
    "shapes": "vlmprune.evaluation.tasks.shapes:shapes",
    "scenes": "vlmprune.evaluation.tasks.scenes:scenes",
    "scenes-sizes": "vlmprune.evaluation.tasks.scenes:scenes_of_sizes",
    "clips": "vlmprune.evaluation.tasks.clips:clips",
}
_TABLE: LazyTable[Callable[[], Task]] = LazyTable("task", _BUILTIN, EvaluationError, group=GROUP)


def list_tasks() -> list[str]:
    """Sorted names of all tasks; loads none of them."""
    return _TABLE.names()


def get_task(name: str) -> Task:
    """The task of this name; "lmms:" and a name or a YAML file is a task of lmms-eval."""
    if name.startswith(LMMS):
        return _lmms(name.removeprefix(LMMS))
    if name not in _TABLE:
        near = did_you_mean(str(name).lower(), list_tasks())
        raise EvaluationError(
            f"task {name!r} is unknown; expected one of {list_tasks()}, or as in 'lmms:gqa'.{near}"
        )
    make = _TABLE.load(name)
    # what goes wrong in a task of this package is not put into other words
    if name in _BUILTIN:
        return make()
    try:
        return make()
    except VlmPruneError:
        raise
    except (Exception, SystemExit) as error:  # code of another package
        raise EvaluationError(f"task {name!r}: {make!r} makes no task: {reason(error)}") from error


def factory(name: str) -> tuple[Callable[[], Task], ...]:
    """What makes a task of another package, in a tuple; an empty one where this package makes it."""
    return (_TABLE.load(name),) if name in _TABLE.offers.points and name not in _BUILTIN else ()


@cache  # its data are read once
def _lmms(name: str) -> Task:
    from .lmms.task import LmmsTask

    return LmmsTask(name)
