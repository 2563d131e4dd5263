# SPDX-License-Identifier: Apache-2.0
"""The tables of benchmarks/accuracy.md are those of the rows that are kept beside it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_tables", BENCHMARKS / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current(tables: ModuleType) -> None:
    page = tables.PAGE.read_text(encoding="utf-8")
    shown = [name for name in tables.TABLES if tables.marks(name)[0] in page]
    assert shown
    assert tables.written(page) == page, "run python benchmarks/tables.py"


def test_a_changed_row_changes_the_page(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tables.PAGE.read_text(encoding="utf-8")
    shown = [name for name in tables.TABLES if tables.marks(name)[0] in page]
    made = {rows for name in shown for rows in tables.TABLES[name].rows}
    kept = {rows for rows in made if (tables.RESULTS / f"{rows}.json").exists()}
    for changed in sorted(kept):
        for name in kept:
            values = json.loads((tables.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
            if name == changed:
                next(row for row in values["rows"] if row["spec"] == "dense")["accuracy"] = 0.1234
            (tmp_path / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
        monkeypatch.setattr(tables, "RESULTS", tmp_path)
        assert "12.3" in tables.written(page) and tables.written(page) != page
        monkeypatch.undo()
