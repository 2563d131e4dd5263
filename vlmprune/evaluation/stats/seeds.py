# SPDX-License-Identifier: Apache-2.0
"""Specs without what varies in a table: their budgets, their seeds, options that say what holds anyway."""

from __future__ import annotations

from dataclasses import replace

from ...errors import EvaluationError
from ...registry import get, option_fields
from ...spec import parse
from .estimates import Table


def seedless(spec: str) -> str:
    """A spec without the seeds of its methods: what several seeds are seeds of."""
    parsed = parse(spec)
    args = [tuple(pair for pair in part.args if pair[0] != "seed") for part in parsed.parts]
    parts = tuple(replace(part, args=kept) for part, kept in zip(parsed.parts, args, strict=True))
    return str(replace(parsed, parts=parts))


def budget_of(spec: str) -> str | None:
    """The budget of a spec as written, that of its last part that has one."""
    found = [str(part.budget) for part in parse(spec).parts if part.budget is not None]
    return found[-1] if found else None


def method_of(spec: str) -> str:
    """A spec without budgets and options at their default: what two tables have in common."""
    names = []
    for part in parse(spec).parts:
        defaults = {option.name: option.default for option in option_fields(get(part.name))}
        # "fastv(layer=2)" and "fastv" are one method where 2 is the default
        given = tuple((key, value) for key, value in part.args if defaults[key] != value)
        names.append(str(replace(part, args=given, budget=None)))
    return "+".join(names)


def query_aware(spec: str) -> bool:
    """Whether a method of a spec, or what it is put around, looks at the question to choose tokens."""
    return any(get(part.name).query_aware for part in parse(spec).parts if not get(part.name).wraps)


def merge_seeds(table: Table) -> tuple[Table, dict[str, list[str]]]:
    """With a column for every set of seeds, and the specs that each of these is the mean of."""
    sets: dict[str, list[str]] = {}
    for spec in table.specs:
        sets.setdefault(seedless(spec), []).append(spec)
    bands = {}
    for name, specs in sets.items():
        if len(specs) > 1:
            # random@64 beside random(seed=1)@64 would be two columns of one name
            if name in specs:
                twice = f"{name!r} is one of the seeds {specs} and the name of their mean"
                raise EvaluationError(f"{twice}; write its seed as well")
            table, bands[name] = table.merged(name, specs), specs
    return table, bands
