# SPDX-License-Identifier: Apache-2.0
"""Summary: from the records of one model and one task to one row per spec, with what belongs beside an accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from ..errors import EvaluationError
from ..registry import get
from ..spec import parse
from . import stats
from .record import Record
from .stats import Table

DENSE = "dense"


def summarise(
    records: Iterable[Record],
    blind: Mapping[str, float],
    *,
    resamples: int = stats.RESAMPLES,
    seed: int = 0,
    matched: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """``{"rows": [...], "headline": {"families", "excluded"}}`` as plain values.

    Accuracies, intervals, differences, flips and the hard slice are over the headline families: those in which the dense model
    beats a blind guesser (``blind``) clearly. Where it has learnt none, all families count and ``headline["families"]`` is empty.
    Specs that differ in their seed get one more row, their mean with a band; p-values are corrected over all rows but the
    single seeds, which are compared with nothing.

    Args:
        records: of ``"dense"`` and of others, all on the same questions.
        matched: for specs without a budget, that of the baselines which they are compared with; it is their ``keep``.
    """
    held: dict[str, list[Record]] = {}
    for record in records:
        held.setdefault(record.spec, []).append(record)
    table = Table.of(record for mine in held.values() for record in mine)
    table.column(DENSE)
    inside, outside = stats.headline(table, blind, DENSE)
    whole, bands = _merge_seeds(table)
    table = whole.where(np.isin(whole.families, inside)) if inside else whole
    singles = {spec for specs in bands.values() for spec in specs}
    tested = [spec for spec in table.specs if spec != DENSE and spec not in singles]
    accuracy = stats.accuracy(table, resamples, seed)
    vs_dense = stats.differences(table, DENSE, tested, resamples=resamples, seed=seed)
    budgets = {spec: budget_of(spec) or (matched or {}).get(spec) for spec in table.specs}
    vs_random = _against_random(table, {spec: budgets[spec] for spec in tested}, resamples, seed)
    rows = []
    for spec in table.specs:
        mine = [record for one in bands.get(spec, [spec]) for record in held[one]]
        seeds = [accuracy[one].value for one in bands.get(spec, [])]
        row = _described(spec, mine) | {
            "keep": budgets[spec],
            "n": len(table),
            "accuracy": accuracy[spec].value,
            "ci": [accuracy[spec].low, accuracy[spec].high],
            "families": stats.by(whole, "families", spec),
            "groups": stats.by(table, "groups", spec),
            "worst": _worst(table, spec),
            "retained": _ratio(accuracy[spec].value, accuracy[DENSE].value),
            "vs_dense": _plain(vs_dense.get(spec)),
            "vs_random": _plain(vs_random.get(spec)),
            "flips": None if spec in bands else stats.flips(table, spec, DENSE),
            "agreement": stats.agreement(table, spec, DENSE),
            "hard": _hard(table, spec, budgets[spec]),
            "mdd": vs_dense[spec].mdd if spec in vs_dense else None,
            "band": {"seeds": bands[spec], "low": min(seeds), "high": max(seeds)} if seeds else None,
        }
        rows.append(row)
    return {"rows": rows, "headline": {"families": inside, "excluded": outside}}


def seedless(spec: str) -> str:
    """A spec without the seeds of its methods: what several seeds are seeds of."""
    parsed = parse(spec)
    parts = tuple(replace(part, args=tuple(pair for pair in part.args if pair[0] != "seed")) for part in parsed.parts)
    return str(replace(parsed, parts=parts))


def budget_of(spec: str) -> str | None:
    """The budget of a spec as written, that of its last part that has one."""
    found = [str(part.budget) for part in parse(spec).parts if part.budget is not None]
    return found[-1] if found else None


def _merge_seeds(table: Table) -> tuple[Table, dict[str, list[str]]]:
    """With a column for every set of seeds, and the specs that each of these is the mean of."""
    sets: dict[str, list[str]] = {}
    for spec in table.specs:
        sets.setdefault(seedless(spec), []).append(spec)
    bands = {}
    for name, specs in sets.items():
        if len(specs) > 1:
            if name in specs:
                raise EvaluationError(f"{name!r} is one of the seeds {specs} and the name of their mean; write its seed as well")
            table, bands[name] = table.merged(name, specs), specs
    return table, bands


def _against_random(
    table: Table, budgets: Mapping[str, str | None], resamples: int, seed: int
) -> dict[str, stats.Difference]:
    """Differences of specs to random tokens of their budgets, corrected together."""
    found: dict[str, stats.Difference] = {}
    for budget in dict.fromkeys(budgets.values()):
        random = f"random@{budget}"
        mine = [spec for spec, its in budgets.items() if its == budget and spec != random]
        if budget is not None and random in table.specs:
            found |= stats.differences(table, random, mine, resamples=resamples, seed=seed)
    corrected = stats.holm(np.array([one.p for one in found.values()]))
    return {spec: replace(one, p_holm=float(p)) for (spec, one), p in zip(found.items(), corrected, strict=True)}


def _described(spec: str, records: Sequence[Record]) -> dict[str, Any]:
    """What pruning did, from the records alone; token counts over samples with images."""
    seen = [record for record in records if record.dense_tokens] or records
    asked = [record.on_object for record in records if record.on_object is not None]
    parts = parse(spec).parts
    return {
        "spec": spec,
        "method": "+".join(part.name for part in parts),
        "calibrated": any(get(part.name).calibrated for part in parts),
        "realised_tokens": float(np.mean([record.realised_tokens for record in seen])),
        "dense_tokens": float(np.mean([record.dense_tokens for record in seen])),
        "layer_tokens": float(np.mean([record.layer_tokens for record in seen])),
        "on_object": float(np.mean(asked)) if asked else None,
        "firings": sum(record.firings for record in records),
        "empty": sum(record.empty for record in records),
        "positions": "/".join(sorted({record.positions for record in records})),
        "encoding": "/".join(sorted({record.encoding for record in records})),
    }


def _worst(table: Table, spec: str) -> dict[str, Any]:
    """The family that retains least, or scores least where the dense model scores nothing."""
    mine, dense = stats.by(table, "families", spec), stats.by(table, "families", DENSE)
    shares = {family: _ratio(mine[family], dense[family]) for family in mine}
    family = min(mine, key=lambda name: (1.0 if shares[name] is None else shares[name], mine[name]))
    return {"family": family, "accuracy": mine[family], "retained": shares[family]}


def _hard(table: Table, spec: str, budget: str | None) -> dict[str, Any] | None:
    """Accuracy on what pooling to the same budget gets wrong."""
    pooled = f"pool@{budget}"
    if pooled not in table.specs or spec == pooled:
        return None
    left = stats.hard(table, pooled)
    return None if left is None else {"n": len(left), "accuracy": float(left.of_spec(spec).mean())}


def _ratio(value: float, of: float) -> float | None:
    return value / of if of else None


def _plain(difference: stats.Difference | None) -> dict[str, Any] | None:
    if difference is None:
        return None
    values = asdict(difference)
    return {"difference": values.pop("value"), "ci": [values.pop("low"), values.pop("high")], **values}
