# SPDX-License-Identifier: Apache-2.0
"""Tasks by name: the built-in benchmark, tasks of lmms-eval ("lmms:gqa"), and entry points of other packages.

Each is loaded when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module, metadata

from ...errors import EvaluationError, VlmPruneError, did_you_mean
from ...plugins import discover, load, reason
from .sample import Task

GROUP = "vlmprune.tasks"
LMMS = "lmms:"
_BUILTIN = {
    "shapes": "vlmprune.evaluation.tasks.shapes:shapes"
}  # name -> function without arguments that returns the task


@cache
def _entry_points() -> dict[str, metadata.EntryPoint]:
    return discover(GROUP, _BUILTIN).points


def list_tasks() -> list[str]:
    """Sorted names of all tasks; loads none of them."""
    return sorted({*_BUILTIN, *_entry_points()})


def get_task(name: str) -> Task:
    """The task of this name; "lmms:" and a name or a YAML file is a task of lmms-eval."""
    if name.startswith(LMMS):
        return _lmms(name.removeprefix(LMMS))
    if name not in list_tasks():
        near = did_you_mean(str(name).lower(), list_tasks())
        raise EvaluationError(
            f"task {name!r} is unknown; expected one of {list_tasks()}, or as in 'lmms:gqa'.{near}"
        )
    if name in _BUILTIN:
        module, _, attribute = _BUILTIN[name].partition(":")
        return getattr(import_module(module), attribute)()
    (make,) = factory(name)
    try:
        return make()
    except VlmPruneError:
        raise
    except (Exception, SystemExit) as error:  # code of another package
        raise EvaluationError(f"task {name!r}: {make!r} makes no task: {reason(error)}") from error


def factory(name: str) -> tuple[Callable[[], Task], ...]:
    """What makes a task of another package, in a tuple; an empty one where this package makes it."""
    point = _entry_points().get(name)
    return () if point is None else (load(f"task {name!r}", point, EvaluationError),)


@cache  # its data are read once
def _lmms(name: str) -> Task:
    from .lmms.task import LmmsTask

    return LmmsTask(name)
