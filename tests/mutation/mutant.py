# SPDX-License-Identifier: Apache-2.0
"""A mutant: one mistake in the package, made while it runs: another function or value stands in for one.

Nothing is said of the text of the code, so that a mutant stays when lines are moved or wrapped. It knows the
qualified name of its target and how the target is called.
"""

from __future__ import annotations

import functools
import importlib
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any


class BrokenMutant(Exception):
    """The mutant is wrong, not the package: its target is gone, or its own code raised."""


@dataclass(frozen=True)
class Checks:
    """Conformance checks of a spec on a family, or one of them by name."""

    spec: str
    family: str
    only: str = ""

    def __str__(self) -> str:
        return f"{self.only or 'checks'} of {self.spec} on {self.family}"


@dataclass(frozen=True)
class Pytest:
    """A test file, or a test of it, from the root of the repository."""

    path: str

    def __str__(self) -> str:
        return self.path


Judge = Checks | Pytest


@dataclass(frozen=True)
class Mutant:
    """A mistake and who must notice it.

    Args:
        name: in plain words, distinct.
        target: "module:qualified.name" of a function, method, property or plain value; see mutant_targets.py.
        change: gives what stands in the target's place, from what stands there.
        by: the judge that must fail.
    """

    name: str
    target: str
    change: Callable[[Any], Any]
    by: Judge

    def __reduce__(self) -> tuple[Any, ...]:
        # functions made on the spot cannot be pickled: a fresh process looks the mutant up again
        from mutant_table import named

        return named, (self.name,)


@dataclass
class Watch:
    """What happened to a mutant while its judge ran.

    Args:
        calls: how often the changed function was called; None where a plain value was changed.
        fault: an error that the mutant's own code raised.
    """

    calls: int | None = None
    fault: str = ""


def resolve(target: str) -> tuple[Any, str, Any]:
    """The module or class that holds a target, its name there, and what stands there now."""
    module, _, path = target.partition(":")
    *outer, name = path.split(".")
    try:
        holder: Any = importlib.import_module(module)
        for part in outer:
            holder = getattr(holder, part)
        return holder, name, vars(holder)[name]
    except (ImportError, AttributeError, KeyError) as error:
        raise BrokenMutant(
            f"{target} is not there ({error!r}); point mutant_targets.py at where it is now"
        ) from error


@contextmanager
def patched(mutant: Mutant) -> Iterator[Watch]:
    """Make the mistake everywhere where the target is known, and undo it at the end."""
    holder, name, value = resolve(mutant.target)
    watch = Watch()
    changed = _changed(value, mutant.change, watch)
    places = [(holder, name), *(_importers(value, name, holder) if isinstance(holder, ModuleType) else ())]
    for place, known_as in places:
        setattr(place, known_as, changed)
    try:
        yield watch
    finally:
        for place, known_as in places:
            setattr(place, known_as, value)


def _changed(value: Any, change: Callable[[Any], Any], watch: Watch) -> Any:
    if isinstance(value, property):
        return property(_changed(value.fget, change, watch))
    if isinstance(value, classmethod | staticmethod):
        return type(value)(_changed(value.__func__, change, watch))
    made = change(value)
    if made is value or (not callable(value) and made == value):
        raise BrokenMutant(f"the change gives back what was there, {value!r}")
    return _watched(made, value, watch, {__file__, change.__code__.co_filename}) if callable(value) else made


def _watched(
    function: Callable[..., Any], original: Callable[..., Any], watch: Watch, own: set[str]
) -> Callable[..., Any]:
    """The changed function: it counts its calls, and notes errors raised in the mutant's own files."""
    watch.calls = 0

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        watch.calls = (watch.calls or 0) + 1
        try:
            return function(*args, **kwargs)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            if last.filename in own:
                watch.fault = f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
            raise

    return call


def _importers(value: Any, name: str, holder: ModuleType) -> Iterator[tuple[ModuleType, str]]:
    """Modules that imported the value, under any name; a plain value counts under its own in its package."""
    package = holder.__name__.partition(".")[0]
    for module in [one for one in sys.modules.values() if isinstance(one, ModuleType)]:
        for known_as in [key for key, held in vars(module).items() if held is value]:
            plain = known_as == name and module.__name__.partition(".")[0] == package
            if (callable(value) or plain) and (module, known_as) != (holder, name):
                yield module, known_as
