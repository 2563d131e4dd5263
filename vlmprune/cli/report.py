# SPDX-License-Identifier: Apache-2.0
"""``vlmprune report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .screen import Json, plain, print_json, stdout


def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A folder that `vlmprune leaderboard --out` wrote.")
    ],
    form: Annotated[
        list[str] | None,
        typer.Option("--format", "-f", help="html (default), csv, json, md or tex; may be repeated."),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(help="File, whose suffix is the format, or folder, which is made; default: RUN."),
    ] = None,
    table: Annotated[
        str | None, typer.Option(help="Of csv, md and tex: 'rows' per spec and task, or methods x 'tasks'.")
    ] = None,
    intervals: Annotated[
        bool,
        typer.Option("--intervals", help="Intervals in tables of csv, md and tex that have room for them."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a run as one offline page or as a table; rows that fail validation are refused by name."""
    from ..errors import SpecError
    from ..evaluation.report import Options, is_folder, write_report

    # None: as the suffix of --out says, or html
    forms: list[str | None] = [*dict.fromkeys(form or [])] or [None]
    if len(forms) > 1 and out is not None and not is_folder(out):
        raise SpecError(f"--out {out!r} with {len(forms)} formats; expected a folder")
    options = Options(table, intervals)
    made = [write_report(run, each, out, options) for each in forms]
    if as_json:
        print_json({"files": list(map(str, made))})
        return
    for path in made:
        stdout().print(plain(f"wrote {path}"), style="green", soft_wrap=True)
