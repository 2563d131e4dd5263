# SPDX-License-Identifier: Apache-2.0
"""Config: what to compare, read from a YAML file; every key is checked, none is ignored."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any, get_args

from ...checks import one_of
from ...core.method import Positions
from ...errors import SpecError, did_you_mean
from ...models.loading import DTYPES
from ...registry import get
from ...spec import Budget, Spec, parse
from ...yamlfile import read
from ..tasks.registry import LMMS, list_tasks
from .published import Published

POSITIONS = get_args(Positions)
SEEDS = (0, 1, 2)
LARGEST = 2**63 - 1
WANTED = {
    "out": "the path of a folder",
    "split": "the name of a split, such as test",
    "published": "the name of a table of the package, or the path of a YAML file",
}


@dataclass(frozen=True)
class Config:
    """A comparison of methods.

    Args:
        models: ``"tiny"``, ``"natural"``, ``"video"``, HF ids or folders.
        specs: what to run on each model; all have the budget they need.
        tasks: what to answer.
        seeds: of ``random``, which is always compared with: at least three, since one draw proves nothing.
        out: folder for the results.
        split, limit: samples of each task; None is all of them.
        batch_size: questions answered together; a part of what is compared: padding can change an answer.
        max_new_tokens: longest answer; None is what the task wants.
        positions: position ids after a cut, "compact" or "original"; None is what each method declares.
        dtype: of the weights; "auto" is what the checkpoint says.
        published: numbers to show beside ours, by the name of a table of the package or of a file.
    """

    models: tuple[str, ...]
    specs: tuple[Spec, ...]
    tasks: tuple[str, ...] = ("shapes",)
    seeds: tuple[int, ...] = SEEDS
    out: str | None = None
    split: str = "test"
    limit: int | None = None
    batch_size: int = 32
    max_new_tokens: int | None = None
    positions: str | None = None
    dtype: str = "auto"
    published: Published | None = field(default=None, repr=False)

    @classmethod
    def of(cls, values: Any, folder: Path | None = None) -> Config:
        """Check values as YAML has them, ``keep`` for specs without a budget. Paths start at ``folder``."""
        known = [*(field.name for field in fields(cls)), "keep"]
        if not isinstance(values, dict):
            raise SpecError(f"a config is a mapping, got {type(values).__name__}; expected the keys {known}")
        for key in values:
            if key not in known:
                raise SpecError(
                    f"unknown key {shown(key)}; expected {known}.{did_you_mean(shown(key), known)}"
                )
        for key in ("models", "specs"):
            if key not in values:
                raise SpecError(f"the key {key!r} is missing; expected a list: {key}: [...]")
        given: dict[str, Any] = {"specs": _specs(values["specs"], values.get("keep"))}
        for key, kind in (("models", str), ("tasks", str), ("seeds", int)):
            if key in values:
                given[key] = _list(key, values[key], kind)
        _check_seeds(given.get("seeds", SEEDS))
        _check_tasks(given.get("tasks", ()))
        for key in ("out", "split"):
            if values.get(key) is not None:
                given[key] = _text(key, values[key])
        for key in ("limit", "batch_size", "max_new_tokens"):
            if values.get(key) is not None:
                given[key] = _count(key, values[key])
        for key, allowed in (("dtype", DTYPES), ("positions", POSITIONS)):
            if values.get(key) is not None:
                one_of(key, values[key] if isinstance(values[key], str) else shown(values[key]), allowed)
                given[key] = values[key]
        if values.get("published") is not None:
            given["published"] = Published.find_file(_text("published", values["published"]), folder)
        return cls(**given)

    def plain(self) -> dict[str, Any]:
        """Values that ``of`` reads again, but for the published numbers, which are named."""
        values = {
            name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()
        }
        return values | {
            "specs": list(map(str, self.specs)),
            "published": self.published and self.published.name,
        }


def load(path: str | PathLike[str]) -> Config:
    """Read a YAML file; errors begin with its path."""
    return read(path, lambda values: Config.of(values, Path(path).parent))


def _specs(value: Any, keep: Any) -> tuple[Spec, ...]:
    """Specs as written, and those that lack a budget once for each of ``keep``."""
    budgets = [] if keep is None else [_budget(one) for one in _list("keep", keep, None)]
    found: list[Spec] = []
    spread = 0  # specs that keep was meant for
    for text in _list("specs", value, str):
        spec = parse(text)
        bare = not any(part.budget for part in spec.parts)
        # ``keep`` is for specs that have no budget and a method that takes one
        takes = bare and any(get(part.name).budgeted for part in spec.parts)
        spread += takes
        found += [spec.with_keep(budget) for budget in budgets] if takes and budgets else [spec]
    if budgets and not spread:
        raise SpecError(
            f"keep={shown(keep)} meets no spec without a budget; leave it out, or write specs without '@'"
        )
    # refused now, and not when their turn comes
    for spec in found:
        spec.build(require_budget=True)
    _distinct("specs", found)
    return tuple(found)


def _budget(value: Any) -> Budget:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise SpecError(f"keep holds {shown(value)}; expected budgets such as 64, 0.25 or 64/crop")
    return Budget.of(value)


def _check_seeds(seeds: tuple[int, ...]) -> None:
    if len(seeds) < len(SEEDS) or min(seeds) < 0 or max(seeds) > LARGEST:
        raise SpecError(
            f"seeds={shown(list(seeds))}; expected at least {len(SEEDS)} that are not negative, and below "
            "2**63: random gets a band of them"
        )


def _check_tasks(names: tuple[str, ...]) -> None:
    # which tasks lmms-eval has is known only where it is installed
    for name in names:
        if name not in list_tasks() and not name.startswith(LMMS):
            near = did_you_mean(name.lower(), list_tasks())
            raise SpecError(
                f"task {name!r} is unknown; expected one of {list_tasks()}, or {LMMS}NAME of lmms-eval.{near}"
            )


def _list(key: str, value: Any, kind: type | None) -> tuple[Any, ...]:
    if not isinstance(value, list) or not value:
        raise SpecError(f"{key}={shown(value)}; expected a list with at least one entry: {key}: [...]")
    for item in value:
        if kind and item == "":
            raise SpecError(f"{key} holds '', an empty text; leave the entry out, or write what it was to be")
        # not isinstance: YAML reads yes as True, which would pass for a 1
        if kind and type(item) is not kind:
            given = f"{shown(item)}, a {type(item).__name__}"
            raise SpecError(f"{key} holds {given}; expected {kind.__name__} (quote what is text)")
    _distinct(key, value)
    return tuple(value)


def _text(key: str, value: Any) -> str:
    if not (isinstance(value, str) and value):
        raise SpecError(f"{key}={shown(value)}; expected {WANTED[key]}")
    return value


def _count(key: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= LARGEST:
        raise SpecError(f"{key}={shown(value)}; expected an int >= 1, below 2**63")
    return value


class _Short(reprlib.Repr):
    """A value as far as a message has room: YAML says in a line what would take gigabytes to print."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 100
        self.maxlist = self.maxdict = 8
        self.maxlevel = 2

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to print very long ones
        return repr(value) if abs(value) <= LARGEST else "an int beyond 64 bits"


shown = _Short().repr


def _distinct(key: str, values: Any) -> None:
    # not a set: entries of YAML need not have a hash
    for number, value in enumerate(values):
        if value in values[:number]:
            raise SpecError(
                f"{key} lists {shown(str(value) if isinstance(value, Spec) else value)} twice; list it once"
            )
