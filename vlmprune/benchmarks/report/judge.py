# SPDX-License-Identifier: Apache-2.0
"""The rows of a run as a table: columns, their texts, and the few judgements that are made about a row."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

BASELINES = ("random", "uniform", "pool")
NOTHING = "\N{EN DASH}"
Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One column: how it is called, what it means, what it sorts by and how it reads."""

    key: str
    title: str
    hint: str
    value: Callable[[Row], Any]
    text: Callable[[Row], str]


def ratio(value: float | None, digits: int = 1) -> str:
    """0.783 -> "78.3"; the unit, per cent, stands in the heading."""
    return NOTHING if value is None else f"{100 * value:.{digits}f}"


def signed(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")


def interval(pair: Sequence[float] | None, show: Callable[[float], str] = ratio) -> str:
    return "" if pair is None else f"[{show(pair[0])}, {show(pair[1])}]"


def p_value(value: float | None) -> str:
    if value is None:
        return ""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}" if value < 0.1 else f"p = {value:.2f}"


def count(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.0f}" if abs(value - round(value)) < 0.05 else f"{value:.1f}"


def part(row: Row, name: str, key: str) -> Any:
    """``row[name][key]``, None where either is not there."""
    return (row.get(name) or {}).get(key)


def _paired(row: Row, name: str) -> str:
    found = row.get(name)
    if not found:
        return NOTHING
    return " ".join([signed(found["difference"]), interval(found.get("ci"), signed), p_value(found.get("p_holm"))]).rstrip()


def _worst(row: Row) -> str:
    worst = row.get("worst")
    return f"{worst['family']} {ratio(worst['retained'], 0)}" if worst and row["spec"] != "dense" else NOTHING


def _tokens(row: Row) -> str:
    read, layers = row["realised_tokens"], row.get("layer_tokens")
    return count(read) if layers is None or abs(layers - read) < 0.05 else f"{count(read)} ({count(layers)})"


def _accuracy(row: Row) -> str:
    text = f"{ratio(row['accuracy'])} {interval(row['ci'])}"
    band = row.get("band")
    return f"{text}, seeds {ratio(band['low'])} to {ratio(band['high'])}" if band else text


def _hard(row: Row) -> str:
    hard = row.get("hard")
    return f"{ratio(hard['accuracy'])} of {hard['n']}" if hard else NOTHING


def _flips(row: Row) -> str:
    flips = row.get("flips")
    return f"{flips['lost']} / {flips['won']}" if flips and row["spec"] != "dense" else NOTHING


COLUMNS = (
    Column("spec", "method", "spec as it is given to vlmprune", lambda r: r["spec"], lambda r: r["spec"]),
    Column("tokens", "tokens",
    "visual tokens read per question, realised; in brackets the mean over the decoder layers, where it differs",
           lambda r: r.get("layer_tokens") or r["realised_tokens"], _tokens),
    Column("accuracy", "accuracy, %", "with its 95 % interval, clustered by picture; for random also lowest and highest seed",
           lambda r: r["accuracy"], _accuracy),
    Column("retained", "retained, %", "accuracy divided by that of the dense model", lambda r: r.get("retained"),
           lambda r: ratio(r.get("retained"))),
    Column("vs_dense", "against dense", "paired difference in points, 95 % interval, p after Holm's correction",
           lambda r: part(r, "vs_dense", "difference"), lambda r: _paired(r, "vs_dense")),
    Column("vs_random", "against random", "paired difference to random tokens at the same budget",
           lambda r: part(r, "vs_random", "difference"), lambda r: _paired(r, "vs_random")),
    Column("general", "general, %", "accuracy on questions that need no reading", lambda r: part(r, "groups", "general"),
           lambda r: ratio(part(r, "groups", "general"))),
    Column("text", "text, %", "accuracy on questions that need reading", lambda r: part(r, "groups", "text"),
           lambda r: ratio(part(r, "groups", "text"))),
    Column("worst", "worst family, % left", "the family that lost most, and what is left of its dense accuracy",
           lambda r: None if r["spec"] == "dense" else part(r, "worst", "retained"), _worst),
    Column("hard", "hard slice, %", "accuracy on the questions that pooling to the same budget gets wrong",
           lambda r: part(r, "hard", "accuracy"), _hard),
    Column("flips", "lost / won", "answers that were right without pruning and are wrong now, and the reverse",
           lambda r: None if r["spec"] == "dense" else part(r, "flips", "lost"), _flips),
    Column("agreement", "same answer, %", "share of questions answered as the dense model does", lambda r: r.get("agreement"),
           lambda r: ratio(r.get("agreement"))),
    Column("on_object", "on object, %", "share of the kept tokens that lie on what is asked about", lambda r: r.get("on_object"),
           lambda r: ratio(r.get("on_object"))),
    Column("paper", "paper, %", "what the paper publishes for this row", lambda r: r.get("paper"),
    lambda r: ratio(r.get("paper"))),
)  # fmt: skip
OPTIONAL = ("vs_random", "general", "text", "hard", "on_object", "paper")  # left out where no row has them


def columns(rows: Iterable[Row]) -> list[Column]:
    """Those that have something to say about these rows."""
    rows = list(rows)
    return [c for c in COLUMNS if c.key not in OPTIONAL or any(c.value(row) is not None for row in rows)]


def series(spec: str) -> str:
    """A spec without its budgets: the curve that a row belongs to."""
    return re.sub(r"@[^+]*", "", spec)


def setting(row: Row) -> tuple[str, str]:
    return row["model"], row["task"]


def is_seed(row: Row, rows: Iterable[Row]) -> bool:
    """Whether this is one seed of a row that is merged over seeds."""
    return row.get("band") is None and any(
        other.get("band") is not None and setting(other) == setting(row)
        and (other["method"], other["keep"]) == (row["method"], row["keep"]) for other in rows
    )  # fmt: skip


def ordered(rows: list[Row]) -> list[Row]:
    """By model and task, dense first, then by budget from many tokens to few, baselines first in each."""
    budgets: dict[Any, float] = {}
    for row in rows:
        key = (*setting(row), row["keep"])
        budgets[key] = max(budgets.get(key, 0), row["realised_tokens"])

    def place(row: Row) -> tuple:
        baseline = BASELINES.index(row["method"]) if row["method"] in BASELINES else len(BASELINES)
        budget = budgets[(*setting(row), row["keep"])]
        return (*setting(row), row["spec"] != "dense", -budget, str(row["keep"]), baseline, row["spec"], row.get("band") is None)

    return sorted(rows, key=place)


def badges(row: Row, rows: list[Row]) -> list[tuple[str, str]]:
    """(kind, text) of what may be said about a row; nothing is said that the intervals do not carry."""
    found = []
    if row["method"] in BASELINES:
        found.append(("baseline", "baseline"))
    if is_best(row, rows):
        found.append(("best", f"best at {row['keep']}"))
    against = row.get("vs_random")
    if against and against.get("p_holm") is not None and against["p_holm"] < 0.05:
        found.append(("good", "beats random") if against["difference"] > 0 else ("bad", "below random"))
    if row.get("calibrated"):
        found.append(("note", "calibrated"))
    return found


def is_best(row: Row, rows: list[Row]) -> bool:
    """Whether the interval of a row lies above those of all other rows with the same budget."""
    if row["keep"] is None or row["spec"] == "dense" or is_seed(row, rows):
        return False
    rivals = [
        other for other in rows
        if other is not row and setting(other) == setting(row) and other["keep"] == row["keep"] and not is_seed(other, rows)
    ]  # fmt: skip
    return bool(rivals) and row["ci"][0] > max(other["ci"][1] for other in rivals)
