# SPDX-License-Identifier: Apache-2.0
"""The page: one HTML file that asks nothing of any other, safe against whatever a model may have answered."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from ...errors import SpecError, UnsupportedError
from ...registry import method_info
from ..leaderboard.rundir import Run
from ..stats.summary import DENSE, Row
from .agreement import Agreement, agreements, tables_of
from .agreement_text import HEAD, METHODS_HEAD, cells, method_cells, title, used_head
from .agreement_text import sentences as agreement_sentences
from .charts import Panel, panels
from .columns import COLUMNS
from .export import BOLD, Options
from .gallery import gallery
from .heat import heat_maps
from .judge import BASELINES, badges, merged, ordered, settings
from .load import Results
from .pivot import pivots
from .sentences import sentences
from .speed import EXPLAINED, SPEED_COLUMNS, speed_groups, speed_notes
from .table import Column, L, Line, used, winners
from .text import ratio

ASSETS = "assets/report"
FLIPS = 48  # questions in the gallery


@dataclass(frozen=True)
class Tags:
    """What the filters look at."""

    model: str
    keep: str
    spec: str
    task: str = ""
    seed: bool = False
    dense: bool = False


@dataclass(frozen=True)
class Cell:
    """A cell of a table: ``head`` in full size, ``rest`` small behind it, ``tail`` small below."""

    column: Column[Any]
    value: Any
    head: str
    rest: str
    tail: str
    wins: bool


@dataclass(frozen=True)
class View:
    """A row as the page shows it."""

    row: Any
    cells: tuple[Cell, ...]
    tags: Tags
    base: bool
    badges: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Chart:
    """The panels of one model and task."""

    model: str
    task: str
    panels: list[Panel]


@dataclass(frozen=True)
class Agreed:
    """Agreement of one model with published tables: a line for each budget, and the methods behind each."""

    title: str
    head: list[str]
    lines: list[list[str]]
    notes: list[str]
    methods: list[tuple[str, list[list[str]]]]


def page(run: Run, results: Results, options: Options) -> str:
    """HTML of a checked run."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        todo = "pip install jinja2 (in a clone it comes with pip install -e '.[eval]')"
        raise UnsupportedError(f"the HTML report needs jinja2: {todo}") from error
    loader = PackageLoader("vlmprune", ASSETS)
    # answers of models are text of strangers; a name that is not given is an error, not nothing
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    script = _asset("page.js")
    rows = ordered(results.rows)
    # by identity: rows hold mappings and have no hash
    seeds = {id(row) for row in rows} - {id(row) for row in merged(rows)}
    speed = speed_groups(results.speed)
    return environment.get_template("page.html").render(
        # only this script may run: what a model answers could not, even if it were not escaped
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=_asset("page.css"),
        note=results.provenance.get("note"),
        date=results.provenance.get("date"),
        summary=sentences(results),
        choices=_choices(rows),
        columns=used(COLUMNS, rows),
        rows=_views(rows, seeds),
        bold=BOLD,
        pivots=[
            (pivot, pivot.columns(), _lines(pivot.columns(), pivot.model, pivot.lines))
            for pivot in pivots(rows)
        ],
        charts=_charts(results, merged(rows)),
        agreed=_agreed(results),
        methods_head=METHODS_HEAD,
        heat=[
            (one, [(line, _tags(line.row, seeds)) for line in one.lines]) for one in heat_maps(results, rows)
        ],
        speed=[(group, [_view(SPEED_COLUMNS, row) for row in group.rows]) for group in speed],
        speed_columns=SPEED_COLUMNS,
        speed_notes=[*speed_notes(results.speed), *([EXPLAINED] if speed else [])],
        gallery=gallery(run, rows, FLIPS),
        failed=results.failed,
        methods=_methods(rows),
        facts=_facts(run, results),
        cells=[row for row in rows if row.fingerprint],
        ratio=ratio,
    )


def _asset(name: str) -> str:
    return files("vlmprune").joinpath(f"{ASSETS}/{name}").read_text(encoding="utf-8")


def _choices(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Of the filters, in the order of the table."""
    return {
        "model": list(dict.fromkeys(row.model for row in rows)),
        "task": list(dict.fromkeys(row.task for row in rows)),
        "keep": list(dict.fromkeys(row.keep for row in rows if row.keep)),
    }


def _tags(row: Row, seeds: set[int]) -> Tags:
    return Tags(row.model, row.keep or "", row.spec, row.task, id(row) in seeds, row.spec == DENSE)


def _views(rows: Sequence[Row], seeds: set[int]) -> list[View]:
    """``seeds``: ids of rows that are single seeds; they win nothing."""
    shown = used(COLUMNS, rows)
    won: set[tuple[int, str]] = set()  # (id of a row, key of a column)
    for where in settings(rows):
        # bests of each model and task on their own
        mine = [row for row in rows if row.setting == where and id(row) not in seeds]
        for column in shown:
            marks = zip(mine, winners(column, mine), strict=True)
            won |= {(id(row), column.key) for row, wins in marks if wins}
    views = []
    for row in rows:
        cells = tuple(_cell(column, row, (id(row), column.key) in won) for column in shown)
        said = tuple(badges(row, rows))
        views.append(View(row, cells, _tags(row, seeds), row.method in BASELINES, said))
    return views


def _lines(columns: Sequence[Column[L]], model: str, lines: Sequence[L]) -> list[View]:
    """Rows of methods x tasks."""
    wins = [winners(column, lines) for column in columns]
    views = []
    for number, line in enumerate(lines):
        cells = [_cell(column, line, won[number]) for column, won in zip(columns, wins, strict=True)]
        views.append(View(line, tuple(cells), _line_tags(model, line), line.method in BASELINES))
    return views


def _line_tags(model: str, line: Line) -> Tags:
    return Tags(model, line.keep or "", line.spec, dense=line.spec == DENSE)


def _view(columns: Sequence[Column[Any]], row: Any) -> tuple[Cell, ...]:
    return tuple(_cell(column, row, False) for column in columns)


def _cell(column: Column[Any], row: Any, wins: bool) -> Cell:
    """What stands in brackets is small, and what follows them."""
    # "78.3 [74.1, 82.0], seeds 77.0 to 79.5" -> 78.3, the brackets, seeds 77.0 to 79.5
    parts = re.fullmatch(r"(.*?)(?: (\[.*?\]|\(.*?\))(?:,? (.*))?)?", column.text(row), re.DOTALL)
    head, rest, tail = parts.groups("") if parts else (column.text(row), "", "")
    return Cell(column, column.value(row), head, rest, tail, wins)


def _agreed(results: Results) -> list[Agreed]:
    tables = tables_of(results)
    every: list[Agreement] = agreements(results.rows, tables)
    shown = []
    for model in tables:
        mine = [one for one in every if one.model == model]
        if not mine:
            continue
        columns = used_head(mine)
        lines = [[line[i] for i in columns] for line in map(cells, mine)]
        methods = [(one.keep, [method_cells(standing) for standing in one.standings]) for one in mine]
        head = [HEAD[i] for i in columns]
        shown.append(Agreed(title(mine[0]), head, lines, agreement_sentences(mine), methods))
    return shown


def _charts(results: Results, rows: Sequence[Row]) -> list[Chart]:
    drawn = []
    for where in settings(rows):
        mine = [row for row in rows if row.setting == where]
        drawn.append(Chart(*where, panels(mine, results.headline_of(where))))
    return [chart for chart in drawn if chart.panels]


def _facts(run: Run, results: Results) -> list[tuple[str, str]]:
    """Provenance as pairs of text, nested values flattened."""
    known = {key: run.info.get(key) for key in ("version", "created", "command", "config")}
    known |= results.provenance
    return [
        (key, _flat(value))
        for key, value in known.items()
        # the note stands above the table
        if key != "note" and value not in (None, "", {}, [])
    ]


def _methods(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """Where each method comes from, and whether constants fitted on data are in it."""
    found = []
    # "debias+fastv" is two methods
    for name in dict.fromkeys(name for row in rows for name in row.method.split("+")):
        try:
            info = method_info(name)
        except SpecError:
            found.append((name, "a plug-in that is not installed here"))
            continue
        licence = f"code read for facts: {info.licence}" if info.licence else "no other code was read"
        parts = [info.paper or "no paper", licence]
        parts.append("calibrated on data" if info.calibrated else "not calibrated")
        if info.query_aware:
            parts.append("reads the question")
        found.append((name, ", ".join(parts)))
    return found


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(
            f"{key} ({_flat(inner)})" if isinstance(inner, dict) else f"{key}: {_flat(inner)}"
            for key, inner in value.items()
        )
    return ", ".join(map(_flat, value)) if isinstance(value, list | tuple) else str(value)
