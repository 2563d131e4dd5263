# SPDX-License-Identifier: Apache-2.0
"""Agreement with published tables: which numbers are compared, at which budgets, and what is said of them."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from report_rows import results, row
from rich.console import Console
from typer.testing import CliRunner

from vlmprune.cli import app, board
from vlmprune.cli.agreement import show
from vlmprune.errors import EvaluationError
from vlmprune.evaluation.leaderboard.published import Published, shipped
from vlmprune.evaluation.report import agreement as module
from vlmprune.evaluation.report.agreement import (
    agreements,
    as_seeds,
    designed_with,
    over_seeds,
    reference,
    tables_of,
)
from vlmprune.evaluation.report.agreement_text import HEAD, cells, method_cells, sentences, title, used_head
from vlmprune.evaluation.stats.seeds import method_of
from vlmprune.plain import plain

# of 100 tokens, so that budgets read as per cent
TABLE: dict[str, Any] = {
    "about": "three papers",
    "tokens": 100,
    "crops": 5,
    "columns": {"gqa": None, "pope": None, "sqa": None},
    "entries": [
        {"spec": "dense", "source": "two", "values": {"gqa": 60.0, "pope": 80.0, "sqa": 50.0}},
        {"spec": "holov@20", "source": "one", "average": 98.0},
        {"spec": "divprune@20", "source": "one", "average": 96.0},
        {"spec": "divprune@20", "source": "two", "average": 94.0},
        {"spec": "fastv(layer=2)@20", "source": "one", "average": 80.0},
        {"spec": "dart@20", "source": "two", "values": {"gqa": 54.0, "pope": 72.0, "sqa": 45.0}},
        {"spec": "fastervlm@10", "source": "three", "average": 90.0},
        {"spec": "fastervlm@40", "source": "three", "average": 99.0},
        {"spec": "fastervlm@25", "source": "three", "average": 97.0},
        {"spec": "visionzip@4/crop", "source": "one", "average": 97.0},
        {"spec": "mmtok@20", "source": "ours", "average": 50.0, "measured": {"commit": "0"}},
    ],
}


def table(**changes: Any) -> Published:
    return Published.of("three.yaml", TABLE | changes)


def retained(spec: str, percent: float, tokens: float = 20.0, **changes: Any):
    """A row that keeps a percentage of the dense accuracy, and ``tokens`` of 100."""
    given = {"retained": percent / 100, "dense_tokens": 100.0, "realised_tokens": tokens, "model": "tiny"}
    return row(spec, percent / 100, **given | changes)


DENSE = retained("dense", 100, 100.0)


def test_what_is_published_of_a_method_at_a_budget() -> None:
    found = table()
    assert (found.retained("divprune", 0.2).value, found.retained("divprune", 0.2).ends) == (95, (94, 96))
    assert (
        found.retained("dart", 0.2).value == pytest.approx(90)
        and found.retained("dart", 0.2).how == "derived"
    )
    assert found.retained("visionzip", 0.2).value == 97  # 4 of each of 5 crops
    between = found.retained("fastervlm", 0.2)
    assert between.how == "interpolated" and 90 < between.value < 97
    assert between.value == pytest.approx(90 + 7 * 0.756471, abs=1e-4)  # log 2 / log 2.5
    assert found.retained("holov", 0.203).value == 98  # the same budget
    assert (
        found.retained("holov", 0.25) is None and found.retained("mmtok", 0.2) is None
    )  # ours is no paper's
    assert found.retained("fastervlm", 0.05) is None  # never beyond what is printed
    assert table(tokens=100).share(found.entries[0]) is None
    without = {key: value for key, value in TABLE.items() if key != "tokens"}
    assert Published.of("x.yaml", without).retained("holov", 0.2) is None


def test_budgets_far_apart_say_nothing_about_those_between() -> None:
    entries = [one for one in TABLE["entries"] if one["spec"] != "fastervlm@25"]
    assert table(entries=entries).retained("fastervlm", 0.2) is None


def test_options_at_their_default_are_no_other_method() -> None:
    assert method_of("fastv(layer=2)@0.25") == method_of("fastv@16") == "fastv"
    assert method_of("fastv(layer=3)@16") == "fastv(layer=3)"
    assert method_of("debias+fastv(layer=2)@16") == "debias+fastv"


def test_methods_are_compared_at_the_budget_they_share() -> None:
    rows = [
        DENSE,
        retained("holov@20", 90),
        retained("divprune@0.2", 80),
        retained("fastv@20", 95),
        retained("visionzip@4/crop", 85),
        retained("zooprune@20", 99),
        retained("random@20", 99),
        retained("holov@50", 99, 50.0),
    ]
    (found,) = agreements(rows, {"tiny": table()})
    assert [one.method for one in found.standings] == ["holov", "visionzip", "divprune", "fastv"]
    assert [(one.ours, one.published) for one in found.standings] == [(90, 98), (85, 97), (80, 95), (95, 80)]
    assert [one.query_aware for one in found.standings] == [False, False, False, True]
    assert found.unpublished == ("zooprune@20",) and found.pairs == 6
    assert found.whole.spearman.value == pytest.approx(-0.2) and found.whole.kendall.value == pytest.approx(0)
    assert [(pair.above, pair.below) for pair in found.swapped] == [
        ("holov", "fastv"),
        ("visionzip", "fastv"),
        ("divprune", "fastv"),
    ]
    assert found.swapped[0].published == 18 and found.swapped[0].ours == 5
    assert found.one_table == (3, 6) and found.designed_with is None
    # holov and visionzip are one point apart, visionzip and divprune two
    assert found.clear == (3, 5) and found.close == (0, 1)
    said = " ".join(sentences([found]))
    assert "at least 2 points apart in print: 3 of 5 at 20. Of those that are closer: 0 of 1 at 20." in said
    assert "fastv above holov at 20 (in print 18.0 points below)" in said and "zooprune@20" in said


def test_shares_are_means_over_the_tasks_and_of_one_picture() -> None:
    rows = []
    for task, percent in (("a", 80), ("b", 90)):
        rows += [retained("dense", 100, 200.0, task=task, dense_tokens=200.0, pictures=2.0)]
        given = {"task": task, "dense_tokens": 200.0, "pictures": 2.0}
        rows += [retained("holov@20", percent, 40.0, **given), retained("divprune@20", 70, 40.0, **given)]
    (found,) = agreements(rows, {"tiny": table()})
    assert {one.method: one.ours for one in found.standings} == {"holov": pytest.approx(85), "divprune": 70}
    assert found.share == 0.2 and found.whole is None  # two methods have no order


def test_the_halves_are_those_of_the_list(monkeypatch) -> None:
    monkeypatch.setattr(module, "designed_with", lambda: {"tiny": ("holov", "divprune")})
    rows = [
        DENSE,
        *(retained(f"{name}@20", 50 + i) for i, name in enumerate(("holov", "divprune", "fastv", "dart"))),
    ]
    (found,) = agreements(rows, {"tiny": table()})
    assert [one.method for one in found.standings if one.designed] == ["holov", "divprune"]
    assert found.designed_with is None and found.held_out is None  # two each
    assert found.whole.n == 4


NAMES = ("holov", "divprune", "fastv", "visionzip", "dart")


def seed_runs(*shares: tuple[float, ...]) -> dict[str, Any]:
    """Runs of one model under several names, with what each method keeps in each of them."""
    found = {}
    for number, values in enumerate(shares):
        model = "natural" if number == 0 else f"runs/seed{number}"
        rows = [retained("dense", 100, 100.0, model=model)]
        rows += [
            retained(f"{name}@20" if name != "visionzip" else "visionzip@4/crop", value, model=model)
            for name, value in zip(NAMES, values, strict=True)
        ]
        found[f"run{number}"] = results(*rows)
    return found


def test_several_runs_are_seeds_of_which_the_mean_is_ranked() -> None:
    given = seed_runs((90, 80, 70, 85, 60), (80, 84, 60, 85, 70), (85, 88, 65, 70, 80))
    rows = as_seeds(given)
    each = {run: agreements(some, {"natural": table()}) for run, some in rows.items()}
    (found,) = over_seeds(each)
    ours = {one.method: (one.ours, one.by_seed) for one in found.standings}
    assert ours["holov"] == (85, (90, 80, 85)) and ours["dart"] == (70, (60, 70, 80))
    assert found.seeds == 3 and found.whole.n == 5 and found.model == "natural"
    assert found.whole.by_seed == tuple(one[0].whole.spearman.value for one in each.values())
    assert len(set(found.whole.by_seed)) == 3
    # in print: holov, visionzip, divprune, dart, fastv; the mean has divprune above visionzip
    assert found.whole.spearman.value == pytest.approx(1 - 6 * 2 / (5 * 24))
    assert {one.method for one in found.standings if one.designed} == {"holov", "fastv"}
    seen = [HEAD[i] for i in used_head([found])]
    assert "of each seed" in seen and "of each seed" not in [HEAD[i] for i in used_head(each["run0"])]
    assert cells(found)[HEAD.index("of each seed")].count(",") == 2
    assert method_cells(found.standings[0])[2] == "85.0 (80.0 to 90.0)"
    said = " ".join(sentences([found]))
    assert "3 seeds" in title(found) and "over methods and seeds" in said
    held_out = ", ".join(f"{value:.2f}" for value in found.held_out.by_seed).replace("-", "\N{MINUS SIGN}")
    assert f"Spearman of each seed, over the held-out methods alone: {held_out} at 20." in said


def test_seeds_that_do_not_compare_are_refused() -> None:
    given = seed_runs((90, 80, 70, 85, 60), (80, 84, 60, 85, 70))
    both = replace(given["run1"], rows=(*given["run1"].rows, retained("dense", 100, 100.0, model="third")))
    with pytest.raises(EvaluationError, match=r"run1 has the models .*third"):
        as_seeds(given | {"run1": both})
    other = replace(given["run1"], rows=tuple(replace(one, task="b") for one in given["run1"].rows))
    with pytest.raises(EvaluationError, match=r"run1 has the tasks \['b'\]"):
        as_seeds(given | {"run1": other})
    fewer = replace(given["run1"], rows=given["run1"].rows[:-1])
    rows = as_seeds(given | {"run1": fewer})
    each = {run: agreements(some, {"natural": table()}) for run, some in rows.items()}
    with pytest.raises(EvaluationError, match=r"only one has \['dart@20'\]"):
        over_seeds(each)


def test_models_of_the_package_stand_for_a_published_one() -> None:
    assert reference("tiny").name == reference("natural").name == "llava-1.5-7b.yaml"
    assert reference("some/model") is None
    assert reference("some/model", "llava-next-7b.yaml").name == "llava-next-7b.yaml"
    assert reference("some/model", "mine.yaml") is None  # a file of the user is not at hand
    of_config = replace(
        results(row("a@9", model="some/model")), provenance={"published": "llava-next-7b.yaml"}
    )
    assert [one.name for one in tables_of(of_config).values()] == ["llava-next-7b.yaml"]
    assert all("random" in methods for methods in designed_with().values())


@pytest.mark.parametrize("share", [1 / 3, 2 / 9, 1 / 9])
def test_ten_methods_are_published_at_each_of_three_budgets(share: float) -> None:
    found = Published.shipped("llava-1.5-7b")
    known = {method: one for method in found.methods() if (one := found.retained(method, share)) is not None}
    assert len(known) >= 15 and {"holov", "divprune", "fastv", "sparsevlm", "fastervlm"} <= set(known)
    assert all(50 < one.value < 101 for one in known.values())


def test_the_printed_order_at_64_tokens_is_that_of_the_papers() -> None:
    found = Published.shipped("llava-1.5-7b")
    order = ["holov", "zooprune", "divprune", "visionzip", "sparsevlm", "fastv"]
    values = [found.retained(name, 64 / 576).value for name in order]
    assert values == sorted(values, reverse=True)
    assert values[0] == 95.8 and values[1] == 95.2


def test_it_stands_under_the_table_of_a_model_that_has_one() -> None:
    names = ("holov", "zooprune", "divprune", "visionzip", "fastv")
    rows = [
        DENSE,
        *(retained(f"{name}@0.111", 50 + i) for i, name in enumerate(names)),
    ]
    for model, there in (("tiny", True), ("some/model", False)):
        mine = [
            row(one.spec, one.accuracy, retained=one.retained, dense_tokens=100.0, model=model)
            for one in rows
        ]
        screen = Console(file=StringIO(), width=200)
        board.show(plain(results(*mine)), screen)
        text = screen.file.getvalue()
        assert ("beside the published averages of llava-1.5-7b" in text) is there
        assert ("fastv above holov at 0.111" in text) is there


@pytest.mark.parametrize("count", [2, 4])
def test_an_order_of_few_methods_is_not_compared(count: int) -> None:
    names = ("holov", "divprune", "visionzip", "fastv")[:count]
    rows = [DENSE, *(retained(f"{name}@20", 50 + i) for i, name in enumerate(names))]
    found = agreements(rows, {"tiny": table()})
    assert found[0].pairs == count * (count - 1) / 2
    line = dict(zip(HEAD, cells(found[0]), strict=True))
    assert line["Spearman"] == "too few methods" and line["p"] == line["Kendall"] == "\N{EN DASH}"
    assert not any(text.startswith("Mean of Spearman") for text in sentences([found[0], found[0]]))
    screen = Console(file=StringIO(), width=100)
    show(found, screen)
    said = " ".join(screen.file.getvalue().split())
    assert f"too few methods are published at these budgets to compare ({count} at 20); 5 are" in said
    assert "Spearman" not in said
    show(found, screen, methods=True)  # asked for, it shows what there is
    assert "Spearman" in screen.file.getvalue()


def test_the_command_reads_a_run(run_folder) -> None:
    """Its models are none that a table is of."""
    runner = CliRunner()
    refused = runner.invoke(app, ["agreement", str(run_folder)])
    assert refused.exit_code == 2 and "nothing is published of ['model-a', 'model-b']" in refused.output
    done = runner.invoke(app, ["agreement", str(run_folder), "--published", "llava-1.5-7b"])
    assert done.exit_code == 0, done.output
    assert "model-b beside the published averages" in done.output and "interpolated" in done.output
    twice = runner.invoke(app, ["agreement", str(run_folder), str(run_folder), "--published", "llava-1.5-7b"])
    assert twice.exit_code == 2 and "hold one twice" in " ".join(twice.output.split())
    unknown = runner.invoke(app, ["agreement", str(run_folder), "--published", "llava-1.5-7"])
    assert unknown.exit_code == 2 and "Did you mean 'llava-1.5-7b'" in " ".join(unknown.output.split())
    assert "llava-next-7b" in shipped()
