# SPDX-License-Identifier: Apache-2.0
"""``vlmprune verify``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.live import Live
from rich.text import Text

from ..errors import InvariantError
from .screen import Json, plain, print_json, stdout, table

if TYPE_CHECKING:
    from ..testing.conformance import CheckResult

# worst first: what a cell shows where a check of a family has several results
_SHOWN = {
    "fail": Text("FAIL", style="bold red"),
    "pass": Text("pass", style="green"),
    "unsupported": Text("n/a", style="yellow"),
}


def verify(
    method: Annotated[
        str, typer.Argument(help="A method or a spec; without a budget, @0.25, or what its schedule allows.")
    ],
    family: Annotated[
        list[str] | None, typer.Option("--family", "-f", help="Only this model family; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run the conformance checks on tiny models of every family; exit code 1 if one fails."""
    from ..testing.conformance import default_spec, run_checks

    spec = default_spec(method)
    results: list[CheckResult] = []
    if as_json:
        run_checks(spec, family or None, results.append)
    else:
        screen = stdout()
        # transient: a live table is cut to the screen, so the whole one is printed at the end
        with Live(Text(f"{spec}: building tiny models"), console=screen, transient=True) as live:

            def on_result(result: CheckResult) -> None:
                results.append(result)
                live.update(_table(spec, results))

            run_checks(spec, family or None, on_result)
        if results:
            screen.print(_table(spec, results), *_details(results), sep="\n")
    if not results:
        raise InvariantError(
            f"no check ran for {spec!r}, so nothing was verified; expected at least one result per family"
        )
    failed = sum(result.status == "fail" for result in results)
    if as_json:
        names = ("check", "family", "status", "detail", "seconds")
        print_json(
            {
                "spec": spec,
                "failed": failed,
                "results": [{name: getattr(r, name) for name in names} for r in results],
            }
        )
    if failed:
        raise typer.Exit(1)


def _table(spec: str, results: list[CheckResult]) -> Any:
    families = list(dict.fromkeys(result.family for result in results))
    rows = table("check", *families, "seconds", title=spec, title_justify="left")
    rows.columns[-1].justify = "right"
    for check in dict.fromkeys(result.check for result in results):
        of_check = [result for result in results if result.check == check]
        cells = []
        for family in families:
            statuses = {result.status for result in of_check if result.family == family}
            cells.append(next((shown for status, shown in _SHOWN.items() if status in statuses), Text("")))
        rows.add_row(check, *cells, f"{sum(result.seconds for result in of_check):.1f}")
    return rows


def _details(results: list[CheckResult]) -> list[Text]:
    lines = []
    for status in ("fail", "unsupported"):
        checks: dict[tuple[str, str], list[str]] = {}  # one reason may hold for many checks
        for result in results:
            if result.status == status:
                checks.setdefault((result.family, result.detail), []).append(result.check)
        for (family, detail), names in checks.items():
            head = f"{family}, {names[0] if len(names) == 1 else f'{len(names)} checks'}: "
            lines.append(Text(head, style=_SHOWN[status].style) + plain(detail or "no detail was given"))
    count = {status: sum(result.status == status for result in results) for status in _SHOWN}
    summary = f"{count['pass']} passed, {count['fail']} failed, {count['unsupported']} unsupported"
    return [*lines, Text(summary, style="bold red" if count["fail"] else "bold green")]
