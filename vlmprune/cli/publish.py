# SPDX-License-Identifier: Apache-2.0
"""``vlmprune publish``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .screen import Json, plain, print_json, stdout


def publish(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A folder that `vlmprune leaderboard --out` wrote.")
    ],
    into: Annotated[
        Path | None,
        typer.Option(
            help="Table of published numbers, a .yaml file; a new one is made. Else they are printed."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn a run of a real checkpoint into rows of a published table, with what they were measured with.

    No question, answer or picture is in them. Rows that others could not measure again are refused.
    """
    from ..errors import SpecError
    from ..evaluation.leaderboard.published import Published
    from ..evaluation.leaderboard.rundir import Run
    from ..evaluation.report.publish import as_yaml, merge, publishable

    if into is not None and into.suffix not in (".yaml", ".yml"):
        raise SpecError(f"--into {str(into)!r} is no .yaml file; give one, such as mine.yaml")
    table = Published.load(into) if into is not None and into.is_file() else None
    found = publishable(Run.open(run), table)
    new = 0 if into is None else merge(into, found)
    if as_json:
        print_json({"entries": list(found.entries), "new": new, "left_out": list(found.left_out)})
        return
    if into is None:
        typer.echo(as_yaml(found.entries), nl=False)  # as_yaml ends its last line
        return
    screen = stdout()
    there = len(found.entries) - new
    known = f"; {there} of the run were there already" if there else ""
    screen.print(plain(f"{into}: {new} new rows{known}"), style="green", soft_wrap=True)
    if found.left_out:
        text = f"not in the table, which has no column of them: {', '.join(found.left_out)}"
        screen.print(plain(text), soft_wrap=True)
