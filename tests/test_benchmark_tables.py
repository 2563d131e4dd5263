# SPDX-License-Identifier: Apache-2.0
"""The tables of benchmarks/accuracy.md are those of the rows that are kept beside it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vlmprune.evaluation.answer.record import Record
from vlmprune.evaluation.report.load import Results
from vlmprune.evaluation.stats.summary import Headline, Row

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


class Kept:
    """A run whose journals are at hand: cell -> right or wrong by question."""

    def __init__(self, cells: dict[str, list[int]], families: list[str]) -> None:
        self.cells, self.families = cells, families

    def journal(self, cell: str) -> list[dict[str, Any]]:
        return [
            line(cell, number, family, self.cells[cell][number])
            for number, family in enumerate(self.families)
        ]


def line(cell: str, number: int, family: str, score: int) -> dict[str, Any]:
    record = Record(
        spec=cell,
        id=f"q{number}",
        cluster=f"q{number}",
        family=family,
        group="g",
        answer="a",
        score=score,
        dense_tokens=9,
        realised_tokens=3,
        layer_tokens=3.0,
        firings=1,
        on_object=None,
        positions="compact",
        encoding="shared",
        seconds={},
    )
    return record.line()


def test_pairs_are_told_apart_by_the_answers_that_count(tables: ModuleType) -> None:
    families = ["color"] * 20 + ["count"] * 20
    cells = {
        "holov@3": [1] * 20 + [0] * 20,
        "fastv@3": [0] * 15 + [1] * 5 + [1] * 20,
        "dart@3": [1] * 19 + [0] + [1] * 20,
        "dart@9": [0] * 40,
        "random@3": [0] * 40,
    }
    fixed = {"model": "m", "task": "t", "n": 20, "accuracy": 0.5, "ci": (0.4, 0.6), "families": {}}
    fixed |= {"realised_tokens": 3.0, "firings": 1, "empty": 0}
    rows = [Row(spec=spec, method=spec[:-2], keep=spec[-1], fingerprint=spec, **fixed) for spec in cells]
    headline = Headline("m", "t", ("color",), {"count": "not learnt"})
    results = Results(tuple(rows), (headline,), (), (), {})
    assert set(tables.told_apart(Kept(cells, families), results)) == {
        ("holov@3", "fastv@3"),
        ("dart@3", "fastv@3"),
    }
