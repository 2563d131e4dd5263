# SPDX-License-Identifier: Apache-2.0
"""``vlmprune agreement``, and what a leaderboard says of it under its table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .screen import Json, plain, print_json, stdout, table

if TYPE_CHECKING:
    from rich.console import Console

    from ..evaluation.leaderboard.published import Published
    from ..evaluation.report.agreement import Agreement
    from ..evaluation.report.load import Results


def agreement(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="A folder that `vlmprune leaderboard --out` wrote. Several are seeds of one model, whose "
            "mean is compared.",
        ),
    ],
    published: Annotated[
        str | None,
        typer.Option(
            help="A table of the package, such as llava-1.5-7b, or a .yaml file; else that of its model."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say how far a run ranks methods as published tables do, at each budget, and which pairs it swaps."""
    from ..errors import EvaluationError
    from ..evaluation.leaderboard.rundir import Run
    from ..evaluation.report.agreement import agreements, as_seeds, over_seeds
    from ..evaluation.report.check import check
    from ..plain import plain as as_plain

    results = {str(run): check(Run.open(run)) for run in runs}
    if len(results) < len(runs):
        raise EvaluationError(
            f"the runs {[str(run) for run in runs]} hold one twice; expected different seeds"
        )
    first = results[str(runs[0])]
    tables = _tables(first, published)
    if len(runs) == 1:
        found = agreements(first.rows, tables)
    else:
        seeds = as_seeds(results)
        found = over_seeds({run: agreements(rows, tables) for run, rows in seeds.items()})
    if not found:
        raise EvaluationError(
            f"{runs[0]} has no method at a budget that is published; run configs/agreement.yaml, which has"
        )
    if as_json:
        print_json(as_plain(found))
        return
    screen = stdout()
    for model in tables:
        show([one for one in found if one.model == model], screen, methods=True)


def _tables(results: Results, published: str | None) -> dict[str, Published]:
    """By model: what it is compared with."""
    from ..errors import EvaluationError, SpecError
    from ..evaluation.leaderboard.published import Published, shipped
    from ..evaluation.report.agreement import tables_of

    if published is None:
        tables = tables_of(results)
    else:
        given = Published.find_file(published)
        if given.tokens is None:
            raise SpecError(
                f"{published}: says no 'tokens' of an unpruned picture, so its budgets are no shares; add it"
            )
        tables = {row.model: given for row in results.rows}  # one for all models of the run
    if not tables:
        models = sorted({row.model for row in results.rows})
        raise EvaluationError(
            f"nothing is published of {models}; choose a table with --published, of {shipped()}"
        )
    return tables


def show(found: Sequence[Agreement], screen: Console, methods: bool = False) -> None:
    """All budgets of one model; ``methods``: with the numbers that were compared."""
    from ..evaluation.report import agreement_text as text

    if not found:
        return
    if not methods and (said := text.too_few(found)):
        screen.print(plain(said), style="dim")
        return
    screen.print(plain(text.title(found[0])), style="bold")
    columns = text.used_head(found)
    made = table(*(text.HEAD[i] for i in columns))
    for one in found:
        cells = text.cells(one)
        made.add_row(*(plain(cells[i]) for i in columns))
    screen.print(made)
    for sentence in text.sentences(found):
        screen.print(plain(sentence), style="dim")
    screen.print()
    for one in found if methods else ():
        screen.print(plain(f"keep {one.keep}: % of dense, the best in print first"), style="bold")
        listed = table(*text.METHODS_HEAD)
        for standing in one.standings:
            listed.add_row(*map(plain, text.method_cells(standing)))
        screen.print(listed)
