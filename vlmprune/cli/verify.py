# SPDX-License-Identifier: Apache-2.0
"""``vlmprune verify``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.live import Live
from rich.text import Text

from ..errors import InvariantError, SpecError
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
    adapter: Annotated[
        str | None,
        typer.Option(help="An adapter of yours, package.module:Adapter, in place of known families."),
    ] = None,
    tiny: Annotated[
        str | None,
        typer.Option(help="Its tiny model, package.module:FAMILY, a vlmprune.testing.families.base.Family."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run the conformance checks on tiny models of every family; exit code 1 if one fails."""
    from ..testing.conformance import default_spec, run_checks

    spec = default_spec(method)
    if adapter is not None or tiny is not None:
        if family or adapter is None or tiny is None:
            raise SpecError("--adapter and --tiny belong together, and stand in place of --family; give both")
        family = [_of_user(adapter, tiny)]
    results: list[CheckResult] = []
    # JSON stands alone on stdout, without a live table
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


def _of_user(adapter: str, tiny: str) -> str:
    """Make an adapter and its tiny model known; the name of the family."""
    from ..models import check_adapter, register_family
    from ..testing.families import add_family
    from ..testing.families.base import Family

    made = _load("--adapter", adapter)
    facts = _load("--tiny", tiny)
    if not isinstance(facts, Family):
        raise SpecError(
            f"--tiny {tiny!r} is a {type(facts).__name__}; expected a vlmprune.testing.families.base.Family"
        )
    # the name of the family is what joins the two
    add_family(facts)
    register_family(facts.name)(check_adapter(made))
    return facts.name


def _load(option: str, target: str) -> Any:
    """What ``package.module:name`` stands for."""
    module, _, name = target.partition(":")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SpecError(
            f"{option} {target!r} cannot be loaded ({error}); expected package.module:name of what can be "
            "imported here"
        ) from error


def _table(spec: str, results: list[CheckResult]) -> Any:
    # a line for each check, a cell in it for each family
    families = list(dict.fromkeys(result.family for result in results))
    rows = table("check", *families, "seconds", title=spec, title_justify="left")
    rows.columns[-1].justify = "right"
    for check in dict.fromkeys(result.check for result in results):
        of_check = [result for result in results if result.check == check]
        cells = []
        for family in families:
            statuses = {result.status for result in of_check if result.family == family}
            # of several results the worst
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
