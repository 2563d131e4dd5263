# SPDX-License-Identifier: Apache-2.0
"""The speed card as a table: what ``vlmprune bench`` measured, with its conditions in every row."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from .table import NOTHING, Column, count

Row = dict[str, Any]


def seconds(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.0f} ms" if value >= 0.1 else f"{value * 1e3:.1f} ms"


def times(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}\N{MULTIPLICATION SIGN}"


def large(value: float | None, units: Sequence[str], base: int) -> str:
    """A number with the unit that keeps it short."""
    if value is None:
        return NOTHING
    for unit in units[:-1]:
        if value < base:
            return f"{value:.3g} {unit}"
        value /= base
    return f"{value:.3g} {units[-1]}"


def flops(value: float | None) -> str:
    return large(value, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"), 1000)


def size(value: float | None) -> str:
    return large(value, ("B", "KiB", "MiB", "GiB"), 1024)


def layers(tokens: Sequence[float] | None) -> str:
    """Runs of equal numbers: "576 x 2, 64 x 30" for 32 layers."""
    if not tokens:
        return NOTHING
    runs = [(value, len(list(group))) for value, group in groupby(tokens)]
    if len(runs) == 1:
        return count(runs[0][0])
    return ", ".join(f"{count(value)} \N{MULTIPLICATION SIGN} {length}" for value, length in runs)


def _spread(row: Row, key: str) -> str:
    low, high = ((row.get(name) or {}).get(key) for name in ("p20", "p80"))
    value = row.get(key)
    if value is None or low is None or high is None:
        return seconds(value)
    factor, digits = (1, 2) if value >= 1 else (1e3, 0 if value >= 0.1 else 1)  # in the unit of the median, which is named once
    return f"{seconds(value)} [{low * factor:.{digits}f}, {high * factor:.{digits}f}]"


SPEED_COLUMNS = (
    Column("spec", "method", "what was attached", lambda r: r["spec"], lambda r: r["spec"]),
    Column("layers", "tokens per layer", "visual tokens per row of the batch in the decoder layers",
           lambda r: sum(r["tokens_per_layer"]) / len(r["tokens_per_layer"]) if r.get("tokens_per_layer") else None,
           lambda r: layers(r.get("tokens_per_layer"))),
    Column("choosing_s", "choosing", "score, select and cut, seconds of the host", lambda r: r.get("choosing_s"),
           lambda r: _spread(r, "choosing_s")),
    Column("first_token_s", "first token", "pixels in, first token out, vision tower and choosing included; median, [20 %, 80 %]",
           lambda r: r.get("first_token_s"), lambda r: _spread(r, "first_token_s")),
    Column("versus_dense", "first token, speed-up", "dense divided by this, within a round", lambda r: r.get("versus_dense"),
           lambda r: times(r.get("versus_dense"))),
    Column("versus_free_k", "against the ideal", "this divided by the time of a model handed the same tokens; 1.00 is perfect",
           lambda r: r.get("versus_free_k"), lambda r: times(r.get("versus_free_k"))),
    Column("total_s", "whole answer", "generate() of the stated answer length; median, [20 %, 80 %]", lambda r: r.get("total_s"),
           lambda r: _spread(r, "total_s")),
    Column("versus_dense_total", "whole answer, speed-up", "dense divided by this, within a round",
           lambda r: r.get("versus_dense_total"), lambda r: times(r.get("versus_dense_total"))),
    Column("flops", "FLOPs, first token", "matrix products and convolutions, counted by torch", lambda r: r.get("flops"),
           lambda r: flops(r.get("flops"))),
    Column("peak_bytes", "peak memory", "beyond the weights, first token", lambda r: r.get("peak_bytes"),
           lambda r: size(r.get("peak_bytes"))),
)  # fmt: skip
CONDITIONS = ("model", "batch", "answer_tokens", "device", "dtype", "attention")


def speed_rows(rows: list[Row]) -> list[dict[str, Any]]:
    """Groups of rows that were measured under the same conditions, with a line that states them."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in CONDITIONS), []).append(row)
    return [{"title": _conditions(group[0]), "rows": group} for group in groups.values()]


def _conditions(row: Row) -> str:
    parts = [str(row.get("label") or row["model"]), f"batch {row['batch']}", f"{row['answer_tokens']} answer tokens",
    row["device"],
             row["dtype"], f"attention: {row['attention']}"]  # fmt: skip
    return ", ".join(parts + ([f"{row['threads']} threads"] if row.get("threads") else []))


def speed_notes(rows: list[Row]) -> list[str]:
    """Remarks that the measurement made on itself, each once."""
    return list(dict.fromkeys(row["note"] for row in rows if row.get("note")))
