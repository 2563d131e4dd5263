# SPDX-License-Identifier: Apache-2.0
"""The columns of the leaderboard: one list that the terminal, the page, Markdown and LaTeX read.

CSV holds every field of a row; the key of a column is the name of its value there.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..stats.estimates import Difference
from ..stats.summary import DENSE, Row
from .judge import LEVEL, side
from .table import Column
from .text import NOTHING, count, interval, p_value, ratio, signed

MARKS = {"better": " \N{UPWARDS ARROW}", "worse": " \N{DOWNWARDS ARROW}", "no different": ""}

ARROWS = f"\N{UPWARDS ARROW}\N{DOWNWARDS ARROW} where Holm-corrected p < {LEVEL}"

# --- cells ----------------------------------------------------------------------------------------


def _layers_differ(row: Row) -> bool:
    # less would not be seen in one decimal
    return row.layer_tokens is not None and abs(row.layer_tokens - row.realised_tokens) >= 0.05


def _tokens(row: Row) -> str:
    read = count(row.realised_tokens)
    if row.pictures and row.pictures > 1:
        return f"{read} ({count(row.realised_tokens / row.pictures)} a picture)"
    return read


def _tokens_note(rows: Sequence[Row]) -> str:
    shown = max((row.pictures or 1 for row in rows), default=1)
    if shown <= 1.005:
        return ""
    dense = max(row.dense_tokens or 0 for row in rows)
    return f"read per question, which shows {shown:.2g} pictures of {count(dense / shown)} on average"


def _per_layer(row: Row) -> str:
    if row.layer_tokens is None:
        return NOTHING
    read = count(row.layer_tokens)
    return f"{read} ({ratio(row.layer_tokens / row.dense_tokens, 0)} %)" if row.dense_tokens else read


def _per_layer_note(rows: Sequence[Row]) -> str:
    if not any(map(_layers_differ, rows)):
        return ""
    return "mean over the decoder layers, which is the cost: a late cut costs more than one before them"


def _query_note(rows: Sequence[Row]) -> str:
    return "yes: the method reads the question, so that its choice is good for that question alone"


def _accuracy(row: Row) -> str:
    text = f"{ratio(row.accuracy)} {interval(row.ci)}"
    return f"{text}, seeds {ratio(row.band.low)} to {ratio(row.band.high)}" if row.band else text


def _accuracy_short(row: Row) -> str:
    return f"{ratio(row.accuracy)} {interval(row.ci, lambda end: ratio(end, 0))}"


def _paired(found: Difference | None) -> str:
    if found is None:
        return NOTHING
    values = f"{signed(found.difference)} {interval(found.ci, signed)}"
    return f"{values} p {p_value(found.p)}, Holm {p_value(found.p_holm)}"


def _paired_short(found: Difference | None) -> str:
    return NOTHING if found is None else f"{signed(found.difference)}{MARKS[side(found)]}"


def _vs_random_short(row: Row) -> str:
    if row.band:
        return f"{ratio(row.band.low, 0)}-{ratio(row.band.high, 0)}"
    return _paired_short(row.vs_random)


def _vs_dense_note(rows: Sequence[Row]) -> str:
    """Where no other line says what arrows are."""
    return "" if any(row.vs_random for row in rows) else ARROWS


def _vs_random_note(rows: Sequence[Row]) -> str:
    seeds = "; random itself: accuracies of its seeds" if any(row.band for row in rows) else ""
    return f"at the same budget, {ARROWS}{seeds}"


def _worst_value(row: Row) -> float | None:
    """Nothing where no family is worse than dense."""
    worst = row.worst
    if row.spec == DENSE or worst is None or worst.retained is None or worst.retained >= 1:
        return None
    return worst.retained


def _worst(row: Row) -> str:
    value = _worst_value(row)
    return f"{row.worst.family} {ratio(value, 0)}" if value is not None and row.worst else NOTHING


def _flips(row: Row, between: str = " / ") -> str:
    return f"{row.flips.lost}{between}{row.flips.won}" if row.flips and row.spec != DENSE else NOTHING


def _questions(row: Row) -> str:
    return str(row.n) if row.clusters is None else f"{row.n} / {row.clusters}"


# in the order of the tables; where there is little room, spare says what goes first
COLUMNS: tuple[Column[Row], ...] = (
    Column(
        "spec",
        title="spec",
        hint="what was run, as it is given to vlmprune",
        value=lambda r: r.spec,
        text=lambda r: r.spec,
        left=True,
    ),
    Column(
        "query_aware",
        title="query",
        hint="whether the method reads the question to choose tokens, so that its choice serves no other one",
        value=lambda r: r.query_aware or None,  # None, so that used() drops the column where no method does
        text=lambda r: "yes" if r.query_aware else "",
        spare=2,
        note=_query_note,
        left=True,
    ),
    Column(
        "realised_tokens",
        title="tokens",
        hint="visual tokens kept per question; in brackets per picture, where questions show several",
        value=lambda r: r.realised_tokens,
        text=_tokens,
        short=lambda r: count(r.realised_tokens),
        spare=8,
        note=_tokens_note,
    ),
    Column(
        "layer_tokens",
        title="tokens per layer",
        hint="visual tokens that a decoder layer reads, mean over the layers, and that as a percentage of "
        "the unpruned ones: what the language model costs. Methods that cut between its layers read all of "
        "them before that",
        value=lambda r: r.layer_tokens,
        text=_per_layer,
        short=lambda r: count(r.layer_tokens),
        spare=4,
        note=_per_layer_note,
    ),
    Column(
        "accuracy",
        title="accuracy, %",
        hint="with its 95 % interval over sets of pictures; for random also lowest and highest of its seeds",
        value=lambda r: r.accuracy,
        text=_accuracy,
        short=_accuracy_short,
        wins=True,
    ),
    Column(
        "retained",
        title="% of dense",
        hint="accuracy as a percentage of the dense one",
        value=lambda r: r.retained,
        text=lambda r: ratio(r.retained),
        short=lambda r: ratio(r.retained, 0),
        spare=3,
    ),
    Column(
        "vs_dense_difference",
        title="vs dense, points",
        hint="paired difference to the model without pruning, its 95 % interval, p, and p corrected by "
        "Holm's method for all rows of the table",
        value=lambda r: r.vs_dense.difference if r.vs_dense else None,
        text=lambda r: _paired(r.vs_dense),
        short=lambda r: _paired_short(r.vs_dense),
        spare=7,
        note=_vs_dense_note,
    ),
    Column(
        "vs_random_difference",
        title="vs random, points",
        hint="the same difference to random tokens at the same budget",
        value=lambda r: r.vs_random.difference if r.vs_random else None,
        text=lambda r: _paired(r.vs_random),
        short=_vs_random_short,
        spare=1,
        note=_vs_random_note,
    ),
    Column(
        "vs_random_equal_difference",
        title="vs random at equal cost, points",
        hint="the difference to random tokens that cost as many tokens per layer, where a method costs more "
        "than its budget says: between the budgets of random in this table, and the dense model above them",
        value=lambda r: r.vs_random_equal.difference if r.vs_random_equal else None,
        text=lambda r: _paired(r.vs_random_equal),
        short=lambda r: _paired_short(r.vs_random_equal),
        spare=5,
        note=lambda rows: (
            "to random tokens at as many tokens per layer, for methods that read more than they keep"
        ),
    ),
    Column(
        "groups_general",
        title="general, %",
        hint="accuracy on questions that need no reading",
        value=lambda r: r.groups.get("general"),
        text=lambda r: ratio(r.groups.get("general")),
        short=lambda r: ratio(r.groups.get("general"), 0),
        wins=True,
        spare=12,
    ),
    Column(
        "groups_text",
        title="text, %",
        hint="accuracy on questions that need reading",
        value=lambda r: r.groups.get("text"),
        text=lambda r: ratio(r.groups.get("text")),
        short=lambda r: ratio(r.groups.get("text"), 0),
        wins=True,
        spare=9,
    ),
    Column(
        "worst_retained",
        title="worst family, % of dense",
        hint="the kind of question that lost most, with the percentage of the dense accuracy that is left",
        value=_worst_value,
        text=_worst,
        spare=6,
        left=True,
    ),
    Column(
        "hard_accuracy",
        title="hard, %",
        hint="accuracy on the questions that pooling to the same budget gets wrong",
        value=lambda r: r.hard.accuracy if r.hard else None,
        text=lambda r: f"{ratio(r.hard.accuracy)} (of {r.hard.n})" if r.hard else NOTHING,
        short=lambda r: ratio(r.hard.accuracy, 0) if r.hard else NOTHING,
        wins=True,
        spare=11,
        note=lambda rows: "right among the questions that pool gets wrong at that budget",
    ),
    Column(
        "flips_lost",
        title="answers lost / won",
        hint="answers that were right without pruning and are wrong with it, and the reverse",
        value=lambda r: r.flips.lost if r.flips and r.spec != DENSE else None,
        text=_flips,
        short=lambda r: _flips(r, "/"),
        spare=10,
    ),
    Column(
        "agreement",
        title="same answer, %",
        hint="share of the questions that are answered as without pruning, right or wrong",
        value=lambda r: r.agreement,
        text=lambda r: ratio(r.agreement),
        short=lambda r: ratio(r.agreement, 0),
        spare=14,
    ),
    Column(
        "on_object",
        title="kept on object, %",
        hint="share of the kept tokens that lie on what the question is about",
        value=lambda r: r.on_object,
        text=lambda r: ratio(r.on_object),
        short=lambda r: ratio(r.on_object, 0),
        spare=15,
    ),
    Column(
        "paper",
        title="paper, %",
        hint="the accuracy that a paper publishes for this row",
        value=lambda r: r.paper,
        text=lambda r: ratio(r.paper),
        spare=13,
    ),
    Column(
        "n",
        title="questions / sets of pictures",
        hint="questions that count, and the sets of pictures they are about: intervals are over these",
        value=lambda r: r.n,
        text=_questions,
        short=lambda r: _questions(r).replace(" ", ""),
        spare=16,
    ),
)
