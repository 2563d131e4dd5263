# SPDX-License-Identifier: Apache-2.0
"""The same rows for other programs: CSV, JSON, and Markdown for a README."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from ..rundir import Run
from .table import badges, columns, is_seed, ordered, setting

_PLAIN = ("spec", "model", "task", "method", "keep", "n", "accuracy", "realised_tokens", "layer_tokens", "dense_tokens",
          "retained",
          "agreement", "mdd", "on_object", "firings", "failed", "empty", "calibrated", "paper", "fingerprint")  # fmt: skip
_NESTED = {
    "vs_dense": ("difference", "p", "p_holm"), "vs_random": ("difference", "p", "p_holm"), "worst": ("family", "accuracy",
    "retained"),
    "flips": ("lost", "won"), "hard": ("n", "accuracy"), "band": ("low", "high"), "groups": ("general", "text"),
}  # fmt: skip


def as_json(run: Run) -> str:
    """The checked rows, speed card and provenance."""
    content = {key: run.results.get(key) for key in ("format", "provenance", "headline")}
    return json.dumps(content | {"rows": ordered(run.rows), "speed": run.speed}, indent=2, ensure_ascii=False) + "\n"


def as_csv(run: Run) -> str:
    """One line per row, every number in a column of its own, families last."""
    families = list(dict.fromkeys(family for row in run.rows for family in row["families"]))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    head = [*_PLAIN, "ci_low", "ci_high"]
    for name, keys in _NESTED.items():
        head += [f"{name}_{key}" for key in keys] + [f"{name}_ci_low", f"{name}_ci_high"] * name.startswith("vs_")
    writer.writerow([*head, *(f"family_{family}" for family in families)])
    for row in ordered(run.rows):
        line = [row.get(key) for key in _PLAIN] + list(row["ci"])
        for name, keys in _NESTED.items():
            found = row.get(name) or {}
            line += [found.get(key) for key in keys] + list(found.get("ci") or [None] * 2) * name.startswith("vs_")
        writer.writerow([_inert(value) for value in line + [row["families"].get(family) for family in families]])
    return file.getvalue()


def _inert(value: Any) -> Any:
    """Spreadsheets run text that begins like a formula."""
    return "'" + value if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def as_markdown(run: Run) -> str:
    """One table per model and task, seeds merged, and what the run was."""
    rows = [row for row in ordered(run.rows) if not is_seed(row, run.rows)]
    parts = []
    note = run.provenance.get("note")
    if note:
        parts.append(f"**{_cell(note)}**")
    for model, task in dict.fromkeys(map(setting, rows)):
        of = [row for row in rows if setting(row) == (model, task)]
        shown = columns(of)
        lines = [" | ".join(column.title for column in shown), " | ".join("---" for _ in shown)]
        for row in of:
            marks = "".join(f" ({text})" for kind, text in badges(row, run.rows) if kind != "baseline")
            cells = [_cell(column.text(row)) for column in shown]
            lines.append(" | ".join([f"{cells[0]}{_cell(marks)}", *cells[1:]]))
        parts.append(f"### {_cell(model)}, {_cell(task)}, n = {of[0]['n']}\n\n" + "\n".join(f"| {line} |" for line in lines))
    versions = ", ".join(f"{name} {version}" for name, version in (run.provenance.get("versions") or {}).items())
    facts = [f"{key}: {run.provenance[key]}" for key in ("commit", "date", "hardware", "command") if run.provenance.get(key)]
    parts.append(_cell("; ".join([versions, *facts])))
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    """Text that stays text in Markdown and in the HTML that is made of it."""
    for letter in "\\`*_[]|":
        text = text.replace(letter, "\\" + letter)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\n", " ")
