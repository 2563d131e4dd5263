# SPDX-License-Identifier: Apache-2.0
"""The tables of benchmarks/accuracy.md that come from runs of the leaderboard:

    python benchmarks/tables.py RUN natural     # take the rows of a run folder, then write the page
    python benchmarks/tables.py                 # write the page again

Rows are kept in benchmarks/results/NAME.json. In the page only what stands between two marks is replaced.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmprune.evaluation.leaderboard.rundir import Run
from vlmprune.evaluation.report.agreement import agreements, tables_of
from vlmprune.evaluation.report.agreement_text import HEAD as AGREED
from vlmprune.evaluation.report.agreement_text import cells, sentences, used_head
from vlmprune.evaluation.report.judge import merged, ordered, side
from vlmprune.evaluation.report.load import Results
from vlmprune.evaluation.stats.summary import BLIND, DENSE, Row
from vlmprune.plain import plain

HERE = Path(__file__).resolve().parent
PAGE, RESULTS = HERE / "accuracy.md", HERE / "results"
FIELDS = (
    *(
        "model",
        "task",
        "spec",
        "method",
        "query_aware",
        "keep",
        "realised_tokens",
        "dense_tokens",
        "layer_tokens",
    ),
    *("pictures", "firings", "empty", "n", "clusters", "accuracy", "ci", "families", "retained", "vs_random"),
    *("vs_random_equal", "band"),
)
Lines = list[str]


def take(folder: Path) -> dict[str, Any]:
    """What the page needs of a run."""
    results = Results.of(Run.open(folder))
    return {
        "provenance": {
            name: results.provenance.get(name) for name in ("versions", "commit", "hardware", "date", "model")
        },
        "headline": plain(results.headline),
        "rows": [{name: plain(getattr(row, name)) for name in FIELDS} for row in results.rows],
    }


def read(name: str) -> Results:
    path = RESULTS / f"{name}.json"
    return Results.read(json.loads(path.read_text(encoding="utf-8")), str(path))


def conditions(results: Results) -> str:
    """In one line: what was asked, and with what."""
    told, versions = results.provenance, results.provenance["versions"]
    dense = next(row for row in results.rows if row.spec == DENSE)
    asked = f"{dense.n} test questions about {dense.clusters} sets of pictures, 95 % intervals over these"
    used = (
        f"torch {versions['torch']}, transformers {versions['transformers']}, {told['hardware']['processor']}"
    )
    weights = told["model"][dense.model]["weights"]
    return f"{asked}; weights `{weights}`, {used}, {told['date'][:10]}, commit {told['commit']}."


def against(row: Row) -> str:
    """Whether a row is told apart from random tokens of its budget."""
    if row.vs_random is None:
        return ""
    return {"better": "+", "worse": "\N{MINUS SIGN}", "no different": "="}[side(row.vs_random)]


def share(value: float) -> str:
    return f"{100 * value:.1f}"


def with_interval(row: Row) -> str:
    return f"{share(row.accuracy)} [{share(row.ci[0])}, {share(row.ci[1])}]"


def name_of(row: Row) -> str:
    seeds = f", {len(row.band.seeds)} seeds" if row.band else ""
    return f"`{row.spec.partition('@')[0]}`{seeds}"


def natural(results: Results) -> Lines:
    """Methods by what they keep at the smallest budget, and below how far papers agree."""
    rows = merged(ordered(results.rows))
    budgets = sorted({int(str(row.keep).partition("/")[0]) for row in rows if row.keep}, reverse=True)
    by_method: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row.keep:
            by_method.setdefault(name_of(row), {})[int(str(row.keep).partition("/")[0])] = row
    dense = next(row for row in rows if row.spec == DENSE)
    blind = next(row for row in rows if row.spec == BLIND)
    families, least = list(dense.families), budgets[-1]

    def line(name: str, aware: bool, cells_: Sequence[str], last: Row, layers: str, mark: str) -> str:
        kinds = [f"{100 * last.families[family]:.0f}" for family in families]
        return "| " + " | ".join([name, "yes" if aware else "", *cells_, mark, layers, *kinds]) + " |"

    head = [f"{budget} tokens" for budget in budgets]
    found = [
        "| accuracy, % | reads the question | "
        + " | ".join([*head[:-1], head[-1] + " of 144"])
        + f" | beside `random` | tokens per layer at {least} | "
        + " | ".join(f"{least}: {family}" for family in families)
        + " |",
        "|---" * (len(budgets) + 4 + len(families)) + "|",
        line(
            "dense, all tokens", False, [with_interval(dense)] + [""] * (len(budgets) - 1), dense, "144", ""
        ),
    ]
    whole = {name: some for name, some in by_method.items() if set(some) >= set(budgets)}
    for name, some in sorted(whole.items(), key=lambda item: -item[1][least].accuracy):
        values = [share(some[budget].accuracy) for budget in budgets[:-1]] + [with_interval(some[least])]
        last = some[least]
        found.append(
            line(name, last.query_aware, values, last, f"{last.layer_tokens or 0:.0f}", against(last))
        )
    found.append(line("no picture", False, [share(blind.accuracy)] * len(budgets), blind, "0", ""))
    agreed = agreements(results.rows, tables_of(results))
    used = used_head(agreed)
    found += ["", "Order of the methods here and in the tables of LLaVA-1.5-7B:", ""]
    found += ["| " + " | ".join(AGREED[i] for i in used) + " |", "|---" * len(used) + "|"]
    found += ["| " + " | ".join(cells(one)[i] for i in used) + " |" for one in agreed]
    return [*found, "", *sentences(agreed)]


def video(results: Results) -> Lines:
    """Methods by budget, with every kind of question."""
    rows = merged(ordered(results.rows))
    dense = next(row for row in rows if row.spec == DENSE)
    families = list(dense.families)
    found = [
        "| accuracy, % | tokens of 1,152 | all | beside `random` | " + " | ".join(families) + " |",
        "|---" * (4 + len(families)) + "|",
    ]
    for row in sorted(rows, key=lambda row: (row.spec == BLIND, -row.realised_tokens, -row.accuracy)):
        tokens = f"{row.realised_tokens:,.0f}"
        kinds = [f"{100 * row.families[family]:.0f}" for family in families]
        cells_ = [name_of(row), tokens, with_interval(row), against(row), *kinds]
        found.append("| " + " | ".join(cells_) + " |")
    return found


TABLES: Mapping[str, Callable[[Results], Lines]] = {"natural": natural, "video": video}


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: made by benchmarks/tables.py, not by hand -->", f"<!-- end of {name} -->"


def written(page: str) -> str:
    """The page with every table anew."""
    for name, table in TABLES.items():
        begin, end = marks(name)
        if begin not in page:
            continue
        results = read(name)
        before, rest = page.split(begin)
        after = rest.split(end)[1]
        lines = [begin, "", *table(results), "", f"*{conditions(results)}*", "", end]
        page = before + "\n".join(lines) + after
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?", help="Folder that vlmprune leaderboard --out wrote.")
    parser.add_argument("name", choices=list(TABLES), nargs="?")
    options = parser.parse_args()
    if (options.run is None) != (options.name is None):
        parser.error("give a run folder and the name of its table, or neither")
    if options.run is not None:
        text = json.dumps(take(options.run), ensure_ascii=False)
        (RESULTS / f"{options.name}.json").write_text(text + "\n", encoding="utf-8")
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
