# SPDX-License-Identifier: Apache-2.0
"""The tables of benchmarks/accuracy.md that come from runs of the leaderboard:

    python benchmarks/tables.py RUN natural     # take the rows of a run folder, then write the page
    python benchmarks/tables.py                 # write the page again

Rows are kept in benchmarks/results/NAME.json. In the page only what stands between two marks is replaced.
A table of seeds is made of the rows of several names.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, permutations
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from vlmprune.evaluation.answer.record import Record
from vlmprune.evaluation.leaderboard.rundir import Run
from vlmprune.evaluation.report.agreement import Agreement, agreements, as_seeds, over_seeds, tables_of
from vlmprune.evaluation.report.agreement_text import HEAD as AGREED
from vlmprune.evaluation.report.agreement_text import cells, sentences, used_head
from vlmprune.evaluation.report.judge import BASELINES, merged, ordered, side
from vlmprune.evaluation.report.load import Results
from vlmprune.evaluation.stats.estimates import LEVEL, Table
from vlmprune.evaluation.stats.intervals import difference_interval
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
TOLD = ("versions", "commit", "hardware", "date", "model", "published")
Lines = list[str]


def take(folder: Path) -> dict[str, Any]:
    """What the page needs of a run. A model in a folder has the name of the folder, wherever that is."""
    run = Run.open(folder)
    results = Results.of(run)
    told = {name: results.provenance.get(name) for name in TOLD}
    told["apart"] = told_apart(run, results)
    told["model"] = {Path(model).name: about for model, about in told["model"].items()}
    rows = [replace(row, model=Path(row.model).name) for row in results.rows]
    return {
        "provenance": told,
        "headline": [plain(replace(one, model=Path(one.model).name)) for one in results.headline],
        "rows": [{name: plain(getattr(row, name)) for name in FIELDS} for row in rows],
    }


def told_apart(run: Run, results: Results) -> list[tuple[str, str]]:
    """Pairs of specs of one budget, the better one first: 0 is outside the interval of their difference."""
    counted = {family for one in results.headline for family in one.families}
    records: dict[str, list[Record]] = {}
    for row in results.rows:
        if row.fingerprint and row.keep and row.method not in BASELINES:
            answers = [Record.read(line) for line in run.journal(row.fingerprint)]
            records[row.spec] = [one for one in answers if one.family in counted]
    table = Table.of(record for mine in records.values() for record in mine)
    sums, count = table.sums  # (C, S), (C,)
    budgets = {row.spec: budget_of(row) for row in results.rows if row.spec in records}
    found = []
    for i, j in permutations(range(len(table.specs)), 2):
        one, other = table.specs[i], table.specs[j]
        (low, _), _ = difference_interval(sums[:, i] - sums[:, j], count, LEVEL)
        if low > 0 and budgets[one] == budgets[other]:
            found.append((one, other))
    return found


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


def budget_of(row: Row) -> float:
    """Tokens, or the share of them; 16 of each crop is 16 where a picture is one crop."""
    return float(str(row.keep).partition("/")[0])


def by_budget(rows: Sequence[Row]) -> tuple[list[float], dict[str, dict[float, Row]]]:
    """Budgets from many tokens to few, and the rows of each method that has all of them."""
    found: dict[str, dict[float, Row]] = {}
    for row in rows:
        if row.keep:
            found.setdefault(name_of(row), {})[budget_of(row)] = row
    budgets = sorted({budget for some in found.values() for budget in some}, reverse=True)
    return budgets, {name: some for name, some in found.items() if set(some) >= set(budgets)}


def head_of(budget: float) -> str:
    return f"{budget:g} tokens" if budget >= 1 else f"{100 * budget:.0f} % of the tokens"


def natural(results: Results) -> Lines:
    """Methods by what they keep at the smallest budget."""
    rows = merged(ordered(results.rows))
    budgets, whole = by_budget(rows)
    dense = next(row for row in rows if row.spec == DENSE)
    blind = next(row for row in rows if row.spec == BLIND)
    families, least = list(dense.families), budgets[-1]

    def line(name: str, aware: bool, cells_: Sequence[str], last: Row, layers: str, mark: str) -> str:
        kinds = [f"{100 * last.families[family]:.0f}" for family in families]
        return "| " + " | ".join([name, "yes" if aware else "", *cells_, mark, layers, *kinds]) + " |"

    head, last_head = [head_of(budget) for budget in budgets], f"{least:g}"
    of_all = f"{dense.realised_tokens:.0f}"
    if least >= 1:
        head[-1] += f" of {of_all}"
    found = [
        "| accuracy, % | reads the question | "
        + " | ".join(head)
        + f" | beside `random` | tokens per layer at {last_head} | "
        + " | ".join(f"{last_head}: {family}" for family in families)
        + " |",
        "|---" * (len(budgets) + 4 + len(families)) + "|",
        line(
            "dense, all tokens", False, [with_interval(dense)] + [""] * (len(budgets) - 1), dense, of_all, ""
        ),
    ]
    for name, some in sorted(whole.items(), key=lambda item: -item[1][least].accuracy):
        values = [share(some[budget].accuracy) for budget in budgets[:-1]] + [with_interval(some[least])]
        last = some[least]
        found.append(
            line(name, last.query_aware, values, last, f"{last.layer_tokens or 0:.0f}", against(last))
        )
    found.append(line("no picture", False, [share(blind.accuracy)] * len(budgets), blind, "0", ""))
    agreed = agreements(results.rows, tables_of(results))
    return [*found, *agreement(agreed), sure(agreed, [results])]


def agreement(agreed: Sequence[Agreement]) -> Lines:
    """How far papers agree."""
    used = used_head(agreed)
    found = ["", "Order of the methods here and in the tables of LLaVA-1.5-7B:", ""]
    found += ["| " + " | ".join(AGREED[i] for i in used) + " |", "|---" * len(used) + "|"]
    found += ["| " + " | ".join(cells(one)[i] for i in used) + " |" for one in agreed]
    return [*found, "", *(f"* {sentence}" for sentence in sentences(agreed))]


def seeds(*runs: Results) -> Lines:
    """What methods keep of the dense accuracy: means over seeds of a model, lowest and highest."""
    rows = [merged(ordered(run.rows)) for run in runs]
    budgets = by_budget(rows[0])[0]
    by_seed = [by_budget(some)[1] for some in rows]
    names = [name for name in by_seed[0] if all(name in some for some in by_seed)]
    tables = tables_of(runs[0])
    numbered = as_seeds({f"seed {number}": run for number, run in enumerate(runs)})
    agreed = over_seeds({name: agreements(some, tables) for name, some in numbered.items()})
    printed = {one.method: one.published for one in agreed[-1].standings}

    def kept(name: str, budget: float) -> list[float]:
        return [some[name][budget].retained or 0.0 for some in by_seed]

    found = [
        f"| % of the dense accuracy, mean of {len(runs)} seeds (lowest to highest) | "
        + " | ".join(f"{budget:g} tokens" for budget in budgets)
        + f" | in print at {budgets[-1]:g} |",
        "|---" * (len(budgets) + 2) + "|",
    ]
    for name in sorted(names, key=lambda name: -fmean(kept(name, budgets[-1]))):
        values = [spread(kept(name, budget)) for budget in budgets]
        print_ = printed.get(name.strip("`").partition("`")[0])
        found.append("| " + " | ".join([name, *values, f"{print_:.1f}" if print_ else ""]) + " |")
    dense = [next(row.accuracy for row in some if row.spec == DENSE) for some in rows]
    found += ["", f"Dense accuracy of the seeds, in %: {', '.join(map(share, dense))}."]
    return [*found, *agreement(agreed), sure(agreed, runs)]


def sure(agreed: Sequence[Agreement], runs: Sequence[Results]) -> str:
    """How many pairs the answers tell apart, in every run alike."""
    apart = set.intersection(*({tuple(pair) for pair in run.provenance["apart"]} for run in runs))
    said = []
    for one in agreed:
        pairs = list(combinations(one.standings, 2))  # in the order of print
        as_printed = sum((above.spec, below.spec) in apart for above, below in pairs)
        swapped = sum((below.spec, above.spec) in apart for above, below in pairs)
        said.append(f"{as_printed + swapped} of {len(pairs)} at {one.keep}, {swapped} of them swapped")
    alike = ", in every seed alike" if len(runs) > 1 else ""
    return (
        "* Pairs that the answers tell apart (the 95 % interval of the paired difference leaves out "
        f"0{alike}): {'; '.join(said)}."
    )


def spread(values: Sequence[float]) -> str:
    return f"{share(fmean(values))} ({share(min(values))} to {share(max(values))})"


def video(results: Results) -> Lines:
    """Methods at every budget that they can keep; then kinds of questions at one budget."""
    rows = merged(ordered(results.rows))
    dense, blind = (next(row for row in rows if row.spec == name) for name in (DENSE, BLIND))
    methods: dict[str, dict[float, Row]] = {}
    for row in rows:
        if row.keep:
            methods.setdefault(name_of(row), {})[budget_of(row)] = row
    budgets = sorted({budget for some in methods.values() for budget in some}, reverse=True)
    shown = budgets[len(budgets) // 2]
    whole = f"{dense.realised_tokens:,.0f}"

    def at(some: Mapping[float, Row], budget: float) -> str:
        return f"{with_interval(some[budget])} {against(some[budget])}".strip() if budget in some else ""

    def usual(some: Mapping[float, Row]) -> Row:
        """At the budget that the methods are ordered by, or the least that this one can keep."""
        return some.get(shown, some[min(some)])

    # those that cannot keep it come last
    best = sorted(methods.items(), key=lambda item: (shown not in item[1], -usual(item[1]).accuracy))
    tokens = [f"{int(budget * dense.realised_tokens)} tokens" for budget in budgets]
    found = [
        f"| accuracy, % | {' | '.join(tokens)} of {whole} |",
        "|---" * (1 + len(budgets)) + "|",
        f"| dense, all tokens | {with_interval(dense)} |" + " |" * (len(budgets) - 1),
    ]
    found += ["| " + " | ".join([name, *(at(some, one) for one in budgets)]) + " |" for name, some in best]
    found.append(f"| no picture | {' | '.join([share(blind.accuracy)] * len(budgets))} |")
    return [*found, *_kinds([dense, *(usual(some) for _, some in best), blind])]


def _kinds(rows: Sequence[Row]) -> Lines:
    """Every kind of question: the first row is that of all tokens, and says which kinds there are."""
    families = list(rows[0].families)
    found = ["", "Kinds of questions:", ""]
    found += [f"| accuracy, % | tokens | {' | '.join(families)} |", "|---" * (2 + len(families)) + "|"]
    for row in rows:
        kinds = [f"{100 * row.families[family]:.0f}" for family in families]
        found.append("| " + " | ".join([name_of(row), f"{row.realised_tokens:,.0f}", *kinds]) + " |")
    return found


def trained(results: Results) -> Lines:
    """Every spec by how many visual tokens a layer reads.

    Baselines that were answered for their cost alone have a share as budget; the mark stands for them.
    """
    found = [
        "| spec | visual tokens that a layer reads | accuracy, % | beside `random` of equal cost |",
        "|---|---|---|---|",
    ]
    rows = [row for row in merged(ordered(results.rows)) if "@0." not in row.spec]
    for row in sorted(rows, key=lambda row: (-reads(row), -row.accuracy, row.spec)):
        seeds = f", {len(row.band.seeds)} seeds" if row.band else ""
        spec = re.sub(r"skip=\([\d,]+\)", "skip=[stop words]", row.spec)
        mark = against(replace(row, vs_random=row.vs_random_equal or row.vs_random))
        found.append(f"| `{spec}`{seeds} | {reads(row):.0f} | {with_interval(row)} | {mark} |")
    return found


def reads(row: Row) -> float:
    """Visual tokens of a prompt, as the mean over layers, or those before them where all read as many."""
    return row.realised_tokens if row.layer_tokens is None else row.layer_tokens


class Made(NamedTuple):
    """A table, and the names of the rows that it is made of; those of seeds may be missing."""

    write: Callable[..., Lines]
    rows: tuple[str, ...]


TABLES: Mapping[str, Made] = {
    "natural": Made(natural, ("natural",)),
    "seeds": Made(seeds, ("natural", "natural_1", "natural_2")),
    "qwen": Made(natural, ("natural_qwen",)),
    "video": Made(video, ("video",)),
    "trained": Made(trained, ("trained",)),
}


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: made by benchmarks/tables.py, not by hand -->", f"<!-- end of {name} -->"


def written(page: str) -> str:
    """The page with every table anew."""
    for name, table in TABLES.items():
        begin, end = marks(name)
        if begin not in page:
            continue
        kept = [rows for rows in table.rows if rows == table.rows[0] or (RESULTS / f"{rows}.json").exists()]
        results = [read(rows) for rows in kept]
        before, rest = page.split(begin)
        after = rest.split(end)[1]
        told = "; ".join(conditions(run).removesuffix(".") for run in results)
        lines = [begin, "", *table.write(*results), "", f"*{told}.*", "", end]
        page = before + "\n".join(lines) + after
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?", help="Folder that vlmprune leaderboard --out wrote.")
    names = sorted({rows for table in TABLES.values() for rows in table.rows})
    parser.add_argument("name", choices=names, nargs="?")
    options = parser.parse_args()
    if (options.run is None) != (options.name is None):
        parser.error("give a run folder and the name of its table, or neither")
    if options.run is not None:
        text = json.dumps(take(options.run), ensure_ascii=False)
        (RESULTS / f"{options.name}.json").write_text(text + "\n", encoding="utf-8")
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
