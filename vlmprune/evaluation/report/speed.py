# SPDX-License-Identifier: Apache-2.0
"""The speed card as a table: what ``vlmprune bench`` measured, in groups that were measured alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...speed.row import SpeedRow
from .table import Column
from .text import NOTHING, flops, layers, plural, seconds, size, times

EXPLAINED = (
    "Medians over interleaved rounds. Against the ideal: the time to the first token divided by that of the "
    "ideal baseline, the same model given only the kept tokens; above 1.00 is the cost of choosing."
)


@dataclass(frozen=True)
class Group:
    """Rows that were measured under the same conditions, and what these were."""

    title: str
    rows: tuple[SpeedRow, ...]


def speed_groups(rows: Iterable[SpeedRow]) -> list[Group]:
    """In the order in which conditions first appear."""
    groups: dict[tuple[object, ...], list[SpeedRow]] = {}
    for row in rows:
        groups.setdefault(row.conditions, []).append(row)
    return [Group(_conditions(mine[0]), tuple(mine)) for mine in groups.values()]


def speed_notes(rows: Iterable[SpeedRow]) -> list[str]:
    """Remarks that the measurement made on itself, each once."""
    return list(dict.fromkeys(row.note for row in rows if row.note))


def _conditions(row: SpeedRow) -> str:
    parts = [row.model, f"batch {row.batch}"]
    parts += [f"{row.text_tokens} text tokens"] if row.text_tokens is not None else []
    parts += [f"{row.answer_tokens} answer tokens", row.device, row.dtype, f"attention: {row.attention}"]
    return ", ".join(parts + ([plural(row.threads, "thread")] if row.threads else []))


def _spread(row: SpeedRow, key: str) -> str:
    """The median with the 20th and the 80th percentile, in the unit of the median, which is named once."""
    value: float | None = getattr(row, key)
    low, high = row.p20.get(key), row.p80.get(key)
    if value is None or low is None or high is None:
        return seconds(value)
    # seconds() writes s from 1 s on, else ms, with one decimal below 0.1 s
    if value >= 1:
        return f"{seconds(value)} [{low:.2f}, {high:.2f}]"
    digits = 0 if value >= 0.1 else 1
    return f"{seconds(value)} [{low * 1e3:.{digits}f}, {high * 1e3:.{digits}f}]"


def _mean(tokens: Sequence[float]) -> float | None:
    return sum(tokens) / len(tokens) if tokens else None


def _ratio(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


SPEED_COLUMNS: tuple[Column[SpeedRow], ...] = (
    Column(
        "spec",
        title="spec",
        hint="what was timed",
        value=lambda r: r.spec,
        text=lambda r: r.spec,
        left=True,
    ),
    Column(
        "tokens_per_layer",
        title="tokens by layer",
        hint="visual tokens that the decoder layers read; where they differ, times the number of layers",
        value=lambda r: _mean(r.tokens_per_layer),
        text=lambda r: layers(r.tokens_per_layer),
        spare=3,
    ),
    Column(
        "processor_s",
        title="processor",
        hint="from the picture to the inputs, making it smaller included; median, [20 %, 80 %]",
        value=lambda r: r.processor_s,
        text=lambda r: _spread(r, "processor_s"),
        short=lambda r: seconds(r.processor_s),
        spare=7,
    ),
    Column(
        "choosing_s",
        title="choosing",
        hint="score, select and cut, as clocked on the host; median, [20 %, 80 %]",
        value=lambda r: r.choosing_s,
        text=lambda r: _spread(r, "choosing_s"),
        short=lambda r: seconds(r.choosing_s),
        spare=4,
    ),
    Column(
        "first_token_s",
        title="first token",
        hint="from pixels to the first token, choosing included; median, [20 %, 80 %]",
        value=lambda r: r.first_token_s,
        text=lambda r: _spread(r, "first_token_s"),
        short=lambda r: seconds(r.first_token_s),
    ),
    Column(
        "versus_dense",
        title="first token, speed-up",
        hint="dense divided by this, within a round",
        value=lambda r: r.versus_dense,
        text=lambda r: times(r.versus_dense),
    ),
    Column(
        "versus_dense_picture",
        title="from the picture, speed-up",
        hint="dense divided by this, processor and first token together, within a round",
        value=lambda r: r.versus_dense_picture,
        text=lambda r: times(r.versus_dense_picture),
        spare=3,
    ),
    Column(
        "versus_free_k",
        title="against the ideal",
        hint="this divided by the time of a model that is given the same tokens; 1.00 is perfect",
        value=lambda r: r.versus_free_k,
        text=lambda r: _ratio(r.versus_free_k),
        spare=1,
    ),
    Column(
        "total_s",
        title="whole answer",
        hint="generate() of the stated answer length; median, [20 %, 80 %]",
        value=lambda r: r.total_s,
        text=lambda r: _spread(r, "total_s"),
        short=lambda r: seconds(r.total_s),
        spare=2,
    ),
    Column(
        "versus_dense_total",
        title="whole answer, speed-up",
        hint="dense divided by this, within a round",
        value=lambda r: r.versus_dense_total,
        text=lambda r: times(r.versus_dense_total),
        spare=1,
    ),
    Column(
        "flops",
        title="FLOPs, first token",
        hint="matrix products and convolutions, counted by torch",
        value=lambda r: r.flops,
        text=lambda r: flops(r.flops),
        spare=6,
    ),
    Column(
        "peak_bytes",
        title="peak memory",
        hint="beyond the weights, first token",
        value=lambda r: r.peak_bytes,
        text=lambda r: size(r.peak_bytes),
        spare=5,
    ),
)
