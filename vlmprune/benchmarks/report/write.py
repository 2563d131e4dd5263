# SPDX-License-Identifier: Apache-2.0
"""From a run folder to files."""

from __future__ import annotations

import os
from collections.abc import Callable
from os import PathLike
from pathlib import Path

from ...core.base import one_of
from ...errors import EvaluationError
from ..rundir import Run
from .check import check
from .export import as_csv, as_json, as_markdown
from .page import page

FORMATS: dict[str, tuple[str, Callable[[Run], str]]] = {
    "html": ("report.html", page), "csv": ("report.csv", as_csv), "json": ("report.json", as_json), "md": ("report.md",
    as_markdown),
}  # fmt: skip


def write_report(folder: str | PathLike[str], form: str = "html", out: str | PathLike[str] | None = None) -> Path:
    """Check a run and write it in one of ``FORMATS``, by default beside its results; returns the path.

    Raises:
        EvaluationError: rows with failed or empty generations, without proof of pruning, or not comparable; all are named.
    """
    one_of("format", form, tuple(FORMATS))
    run = Run.open(folder)
    check(run)
    name, make = FORMATS[form]
    path = Path(out) if out is not None else run.folder / name
    if path.is_dir():
        path = path / name
    text = make(run)
    partial = path.with_name(path.name + ".part")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)  # a full disk leaves an older report whole
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise EvaluationError(f"{path} cannot be written ({error}); choose another place with --out") from error
    return path
