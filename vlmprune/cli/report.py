# SPDX-License-Identifier: Apache-2.0
"""``vlmprune report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .screen import Json, plain, print_json, stdout


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `vlmprune leaderboard --out` wrote.")],
    form: Annotated[
        list[str] | None, typer.Option("--format", "-f", help="html (default), csv, json or md; may be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File or folder to write to; default: into RUN.")] = None,
    as_json: Json = False,
) -> None:
    """Write a run as one offline page or as a table; rows that cannot be believed are refused by name."""
    from ..benchmarks.report import write_report
    from ..errors import SpecError

    forms = list(dict.fromkeys(form or ["html"]))
    if len(forms) > 1 and out is not None and not out.is_dir():
        raise SpecError(f"--out {str(out)!r} with {len(forms)} formats; expected a folder that is there")
    made = [write_report(run, each, out) for each in forms]
    if as_json:
        print_json({"files": list(map(str, made))})
        return
    for path in made:
        stdout().print(plain(f"wrote {path}"), style="green", soft_wrap=True)
