# SPDX-License-Identifier: Apache-2.0
"""The page: one HTML file that asks nothing of any other, safe against whatever a model may have answered."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import Any

from ...errors import UnsupportedError
from ..rundir import Run
from .charts import panels
from .gallery import flips
from .speed import SPEED_COLUMNS, speed_notes, speed_rows
from .summary import sentences
from .table import NOTHING, badges, columns, is_seed, ordered, ratio, series, setting

ASSETS = ("assets", "report")


def page(run: Run, *, gallery: int = 36) -> str:
    """HTML of a checked run; ``gallery`` is the largest number of flips shown."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise UnsupportedError("the HTML report needs jinja2: pip install jinja2 (it comes with vlmprune[eval])") from error
    environment = Environment(loader=PackageLoader("vlmprune", "/".join(ASSETS)), autoescape=True, undefined=StrictUndefined)
    script = _asset("page.js")
    shown, notes = flips(run, gallery)
    rows = ordered(run.rows)
    speed = speed_rows(run.speed)
    return environment.get_template("page.html").render(
        # only this script may run: what a model answers could not, even if it were not escaped
        script=script, script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(), style=_asset("page.css"),
        run=run, rows=_views(rows), columns=columns(rows), settings=_settings(rows), summary=sentences(rows),
        heat=_heat(rows, run.results.get("headline") or []), charts=_charts(rows), flips=shown, gallery_notes=notes,
        speed=speed, speed_columns=SPEED_COLUMNS, speed_notes=speed_notes(run.speed),
        facts=_facts(run), cells=_cells(rows), ratio=ratio, nothing=NOTHING,
    )  # fmt: skip


def _asset(name: str) -> str:
    return files("vlmprune").joinpath(*ASSETS, name).read_text(encoding="utf-8")


def _tags(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the filters look at."""
    return {
        "model": row["model"], "task": row["task"], "keep": row["keep"] or "", "spec": row["spec"],
        "seed": is_seed(row, rows), "dense": row["spec"] == "dense",
    }  # fmt: skip


def _views(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    shown = columns(rows)
    views = []
    for row in rows:
        cells = [{"column": column, "text": column.text(row), "value": column.value(row)} for column in shown]
        views.append({"row": row, "cells": cells, "badges": badges(row, rows), "tags": _tags(row, rows)})
    return views


def _settings(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Choices of the filters, in the order of the table."""
    budgets = dict.fromkeys(row["keep"] for row in rows if row["keep"])
    return {
        "model": list(dict.fromkeys(row["model"] for row in rows)), "task": list(dict.fromkeys(row["task"] for row in rows)),
        "keep": list(budgets),
    }  # fmt: skip


def _charts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    merged = [row for row in rows if not is_seed(row, rows)]
    where = dict.fromkeys(map(setting, merged))
    drawn = [{"model": m, "task": t, "panels": panels([row for row in merged if setting(row) == (m, t)])} for m, t in where]
    return [chart for chart in drawn if chart["panels"]]


def _heat(rows: list[dict[str, Any]], headline: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per model and task: what each row retains of the dense accuracy in each family."""
    maps = []
    left_out = {setting(entry): entry["excluded"] for entry in headline}
    for where in dict.fromkeys(map(setting, rows)):
        dense = next((row for row in rows if setting(row) == where and row["spec"] == "dense"), None)
        if dense is None:
            continue
        families, excluded = list(dense["families"]), left_out.get(where, {})
        lines = []
        for row in rows:
            if setting(row) != where or row is dense:
                continue
            kept = [_kept(row, dense, family) for family in families]
            lowest = min(
                (k for k, family in zip(kept, families, strict=True) if k is not None and family not in excluded), default=None
            )
            cells = [{"kept": k, "worst": k is not None and k == lowest, "strength": _strength(k), "out": family in excluded}
                     for k, family in zip(kept, families, strict=True)]  # fmt: skip
            lines.append({"row": row, "cells": cells, "tags": _tags(row, rows)})
        maps.append(
            {"model": where[0], "task": where[1], "families": families, "dense": dense, "lines": lines, "excluded": excluded}
        )
    return maps


def _kept(row: dict[str, Any], dense: dict[str, Any], family: str) -> float | None:
    of, value = dense["families"][family], row["families"].get(family)
    return value / of if of and value is not None else None


def _strength(kept: float | None) -> float:
    """Opacity of a cell: none at 100 %, full at 40 % and below."""
    return 0.0 if kept is None else round(min(1.0, abs(1 - kept) / 0.6), 3)


def _facts(run: Run) -> list[tuple[str, str]]:
    """Provenance as pairs of text, nested values flattened."""
    known = {**{key: run.info.get(key) for key in ("version", "created", "command", "config")}, **run.provenance}
    return [(key, _flat(value)) for key, value in known.items() if key != "note" and value not in (None, "", {}, [])]


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(
            f"{key}: {_flat(inner)}" if not isinstance(inner, dict) else f"{key} ({_flat(inner)})" for key, inner in value.items()
        )
    return ", ".join(map(_flat, value)) if isinstance(value, list | tuple) else str(value)


def _cells(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row.get("fingerprint")]


__all__ = ["page", "series"]
