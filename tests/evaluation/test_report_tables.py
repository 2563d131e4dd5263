# SPDX-License-Identifier: Apache-2.0
"""Tables of a report: one list of columns, methods x tasks, what is marked, LaTeX and Markdown."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import fields, replace
from itertools import pairwise

import pytest
from report_rows import difference, results, row
from rich.console import Console
from simulated_run import EVIL

from vlmprune.cli.board import fitting, show
from vlmprune.evaluation.leaderboard.rundir import Run
from vlmprune.evaluation.report import Options, write_report
from vlmprune.evaluation.report.check import _unbelievable
from vlmprune.evaluation.report.columns import COLUMNS
from vlmprune.evaluation.report.export import as_csv, as_markdown
from vlmprune.evaluation.report.judge import badges, is_best, is_seed, ordered, series, side, task_names
from vlmprune.evaluation.report.latex import as_latex, escape
from vlmprune.evaluation.report.load import Results
from vlmprune.evaluation.report.pivot import pivots
from vlmprune.evaluation.report.table import Column, used, winners
from vlmprune.evaluation.report.text import interval, p_value, ratio, signed
from vlmprune.evaluation.report.verdict import limits
from vlmprune.evaluation.stats.summary import Band, Headline, Row, Worst
from vlmprune.plain import flat, plain

NONE = Run(None)  # tables ask a run folder for nothing
COLUMN = {column.key: column for column in COLUMNS}


def tables(text):
    """Cells of the tables of a Markdown text."""
    found = []
    for table in re.findall(r"(?:^\|.*\|\n)+", text + "\n", re.MULTILINE):
        found.append([re.split(r" \| ", line[2:-2]) for line in table.splitlines()])
    return found


# --- one list of columns --------------------------------------------------------------------------


def test_csv_holds_the_value_of_every_column_under_its_key(run_folder, tmp_path):
    lines = list(csv.DictReader(io.StringIO(write_report(run_folder, out=tmp_path / "x.csv").read_text())))
    rows = ordered(Results.of(Run.open(run_folder)).rows)
    seen = set()
    for line, one in zip(lines, rows, strict=True):
        for column in used(COLUMNS, rows):
            value = column.value(one)
            if value is not None:
                assert line[column.key] == str(value), column.key
                seen.add(column.key)
    # no paper is beside this run, and nothing in it costs more than it keeps
    assert seen == {column.key for column in COLUMNS} - {"paper", "vs_random_equal_difference"}


def test_a_new_column_is_in_every_table(monkeypatch):
    """A metric takes its field and value in summary.py, and its column: nothing else has to know it."""
    words = {"key": "seconds", "title": "seconds", "hint": "how long it took"}
    extra = Column(**words, value=lambda r: r.mdd, text=lambda r: "12 s", spare=2)
    listed = (*COLUMNS, extra)
    for module in ("evaluation.report.export", "evaluation.report.latex", "cli.board"):
        monkeypatch.setattr(f"vlmprune.{module}.COLUMNS", listed)
    found = results(row("dense"), row("a@9", mdd=0.1))
    assert "seconds" in tables(as_markdown(NONE, found, Options()))[0][0]
    latex = as_latex(NONE, found, Options())
    assert "& seconds" in latex and "& 12 s" in latex
    screen = Console(width=100, record=True, file=io.StringIO())
    show({"rows": plain(found.rows)}, screen)
    assert "seconds" in (text := screen.export_text()) and "12 s" in text


def test_columns_that_no_row_has_a_value_for_are_left_out():
    rows = [row("dense"), row("a@9")]
    assert [c.key for c in used(COLUMNS, rows)] == ["spec", "realised_tokens", "accuracy", "n"]
    assert "paper" in [c.key for c in used(COLUMNS, [*rows, row("b@9", paper=0.7)])]


def test_narrow_screens_drop_in_the_stated_order_and_never_the_first():
    assert len({column.spare for column in COLUMNS if column.spare}) == sum(c.spare > 0 for c in COLUMNS)
    assert [column.key for column in COLUMNS if not column.spare] == ["spec", "accuracy"]

    order = sorted((c for c in COLUMNS if c.spare), key=lambda c: c.spare)
    assert order[0].key == "vs_random_difference" and order[-1].key == "n"
    rows = [row("a@9", vs_random=difference(0.1), vs_dense=difference(0.1), retained=0.5, paper=0.4)]
    screens = [Console(width=width) for width in range(200, 10, -1)]
    shown = [[c.key for c in fitting(used(COLUMNS, rows), rows, screen)] for screen in screens]
    gone = [key for wide, narrow in pairwise(shown) for key in wide if key not in narrow]
    spare = {c.key: c.spare for c in COLUMNS}
    assert [spare[key] for key in gone] == sorted((spare[key] for key in gone), reverse=True)
    assert shown[-1] == ["spec", "accuracy"] and len(shown[0]) == 8


def test_a_difference_is_shown_with_its_interval_p_and_holm():
    one = row("a@9", vs_dense=difference(-0.023, half=0.017, p=0.036))
    column = COLUMN["vs_dense_difference"]
    assert (
        column.text(one) == "\N{MINUS SIGN}2.3 [\N{MINUS SIGN}4.0, \N{MINUS SIGN}0.6] p = 0.018, Holm = 0.036"
    )
    assert column.brief(one) == "\N{MINUS SIGN}2.3 \N{DOWNWARDS ARROW}"
    assert column.brief(row("b@9", vs_dense=difference(-0.023, half=0.03))) == "\N{MINUS SIGN}2.3"


def test_the_worst_family_is_named_only_where_it_is_worse_than_dense():
    column = COLUMN["worst_retained"]
    assert column.text(row("a@9", worst=Worst("text", 0.4, 0.5))) == "text 50"
    for harmless in (Worst("text", 0.8, 1.0), Worst("text", 0.9, 1.1), Worst("text", 0.0, None)):
        assert column.text(row("a@9", worst=harmless)) == "\N{EN DASH}"
    assert column.text(row("dense", worst=Worst("text", 0.4, 1.0))) == "\N{EN DASH}"


def test_tokens_are_given_per_question_and_per_picture():
    one = row("a@32", realised_tokens=35.2, layer_tokens=66.0, pictures=1.1)
    assert COLUMN["realised_tokens"].text(one) == "35.2 (32 a picture)"
    assert COLUMN["realised_tokens"].text(replace(one, pictures=1.0)) == "35.2"
    assert COLUMN["layer_tokens"].text(one) == "66"
    assert COLUMN["layer_tokens"].text(replace(one, dense_tokens=158.4)) == "66 (42 %)"


def test_only_blind_may_say_nothing():
    said = list(_unbelievable(row("holov@9", empty=6)))
    assert len(said) == 1 and "6 of 100 answers are empty" in said[0]
    assert list(_unbelievable(row("blind", empty=6))) == []


def test_a_few_empty_answers_are_told_and_not_refused():
    few = row("holov@9", empty=5)
    assert list(_unbelievable(few)) == []
    told = "Answers that are empty count as wrong: 5 of 100 of holov@9."
    assert told in limits([few, row("blind", empty=9)], None)
    assert len(list(_unbelievable(row("dense", empty=1)))) == 1  # an unpruned model has no excuse


def test_empty_answers_are_counted_among_the_answers_of_all_seeds_and_families():
    mean = row("random@9", n=50, answers=300, empty=12)  # of three seeds, half of the questions count
    assert list(_unbelievable(mean)) == []
    assert "12 of 300 of random@9" in " ".join(limits([mean], None))
    assert "16 of 300 answers are empty" in next(_unbelievable(replace(mean, empty=16)))


def test_what_one_question_cannot_show_is_said():
    said = limits([row("dense", clusters=1), row("a@9", clusters=1, mdd=2.8)], None)
    assert said[0] == "With so few questions no difference to dense could be found."
    assert said[1].startswith("With only 1 set of pictures")
    (few,) = limits([row("a@9", mdd=0.4), row("b@9", mdd=1.3)], None)
    assert "below 40.0 to 100.0 points" in few


def test_methods_that_read_the_question_are_marked():
    rows = [row("holov@9"), row("fastv@9", query_aware=True)]
    assert [COLUMN["query_aware"].text(one) for one in rows] == ["", "yes"]
    assert "query_aware" not in [column.key for column in used(COLUMNS, rows[:1])]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00009, "< 0.001"), (0.001, "= 0.001"), (0.0456, "= 0.046"), (0.1, "= 0.10"), (1, "= 1.00")],
)
def test_p_values_say_what_is_known(value, text):
    assert p_value(value) == text


def test_numbers_read_alike_everywhere():
    assert (ratio(0.7834), ratio(0.7834, 0), ratio(None)) == ("78.3", "78", "\N{EN DASH}")
    assert (signed(0.083), signed(-0.083), signed(-0.0001)) == ("+8.3", "\N{MINUS SIGN}8.3", "0.0")
    assert interval((0.1, 0.25)) == "[10.0, 25.0]"


# --- order and judgements -------------------------------------------------------------------------


def test_tasks_and_models_stand_as_in_the_config_and_budgets_fall():
    rows = []
    for model in ("z", "a"):
        for task in ("lmms:zebra", "shapes"):
            for spec in ("b@9", "a@36", "random@36", "random@9", "dense"):
                rows.append(row(spec, model=model, task=task))
    found = ordered(rows)
    assert list(dict.fromkeys(one.setting for one in found)) == [
        ("z", "lmms:zebra"),
        ("z", "shapes"),
        ("a", "lmms:zebra"),
        ("a", "shapes"),
    ]
    assert [one.spec for one in found[:5]] == ["dense", "random@36", "a@36", "random@9", "b@9"]


def test_tasks_have_short_names_unless_these_are_the_same():
    assert task_names(["shapes", "lmms:gqa", "lmms:my/pope.yaml"]) == {
        "shapes": "shapes",
        "lmms:gqa": "gqa",
        "lmms:my/pope.yaml": "pope",
    }
    assert task_names(["shapes", "lmms:shapes"]) == {"shapes": "shapes", "lmms:shapes": "lmms:shapes"}


def test_best_needs_an_interval_above_all_others():
    rows = [row("a@36", 0.75), row("b@36", 0.645, half=0.045), row("random@36", 0.45)]
    assert [is_best(one, rows) for one in rows] == [True, False, False]
    overlaps = [rows[0], replace(rows[1], ci=(0.6, 0.71)), rows[2]]
    assert not any(is_best(one, overlaps) for one in overlaps)
    assert not is_best(row("c@9", 0.9), [row("c@9", 0.9)])  # alone is not best
    assert not is_best(row("dense", 0.95), rows)


def test_seeds_are_known_by_their_mean():
    seed, other = row("random(seed=0)@9"), row("random(seed=7)@9")
    mean = row("random@9", band=Band(("random(seed=0)@9",), 0.4, 0.6))
    assert [is_seed(one, [seed, other, mean]) for one in (seed, other, mean)] == [True, False, False]
    elsewhere = replace(mean, task="another")
    assert not is_seed(seed, [seed, elsewhere])


def test_a_difference_counts_only_beyond_its_interval_and_its_correction():
    assert side(difference(0.2)) == "better" and side(difference(-0.2)) == "worse"
    assert side(difference(0.05)) == side(difference(0.2, p=0.05)) == "no different"


@pytest.mark.parametrize(
    ("p", "value", "badge"), [(0.04, 0.2, "beats random"), (0.04, -0.2, "below random"), (0.06, 0.2, None)]
)
def test_a_badge_needs_a_corrected_p_value(p, value, badge):
    one = row("a@36", vs_random=difference(value, p=p))
    assert [text for _, text in badges(one, [one])] == ([badge] if badge else [])


def test_the_highest_of_a_budget_wins_to_the_digits_that_are_shown():
    accuracy = COLUMN["accuracy"]
    scores = {
        "dense": 0.99,
        "a@9": 0.7,
        "b@9": 0.70004,
        "c@9": 0.6,
        "a@4": 0.5,
        "b@4": 0.4,
        "a@2": 0.3,
        "b@2": 0.3,
    }
    rows = [row(spec, score) for spec, score in scores.items()]
    won = [one.spec for one, wins in zip(rows, winners(accuracy, rows), strict=True) if wins]
    assert won == ["a@9", "b@9", "a@4"]  # at 2 nothing is higher
    assert not any(winners(COLUMN["retained"], rows))
    assert winners(accuracy, [row("a@9", 0.7)]) == [False]


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("a@36", "a"),
        ("debias+fastv(layer=2)@0.25/crop", "debias+fastv(layer=2)"),
        ("var+a@9", "var+a"),
        ("dense", "dense"),
    ],
)
def test_a_curve_is_a_spec_without_its_budget(spec, name):
    assert series(spec) == name


# --- methods x tasks ------------------------------------------------------------------------------


def crossing():
    """Two models; b@9 has no row on the second task of the first model."""
    rows = []
    for model in ("m", "n"):
        for task, dense in (("lmms:z", 0.8), ("shapes", 0.5)):
            where = {"model": model, "task": task, "n": 40 if dense > 0.6 else 60}
            rows += [row("dense", dense, retained=1.0, **where)]
            rows += [row("a@9", dense / 2, retained=0.5, **where)]
            rows += [row("b@36", dense / 4, retained=0.25, **where)]
            if (model, task) != ("m", "shapes"):
                rows += [row("b@9", dense, retained=1.0, **where)]
    return rows


def test_methods_and_tasks_give_average_and_share_of_dense():
    first, second = pivots(crossing())
    assert (first.model, first.tasks, second.model) == ("m", ("lmms:z", "shapes"), "n")
    lines = {line.spec: line for line in first.lines}
    assert list(lines) == ["dense", "b@36", "a@9", "b@9"]
    assert lines["a@9"].average == pytest.approx(0.325) and lines["a@9"].retained == 0.5
    assert lines["dense"].average == pytest.approx(0.65) and lines["dense"].retained == 1
    assert (lines["b@9"].average, lines["b@9"].retained) == (None, None)  # a task is missing
    assert first.sizes == "z (n = 40), shapes (n = 60)"
    cells = [column.text(lines["b@9"]) for column in first.columns()]
    assert cells == ["b@9", "80.0", *["\N{EN DASH}"] * 3]
    assert first.columns(intervals=True)[1].text(lines["b@9"]) == "80.0 [75.0, 85.0]"


def test_a_share_of_dense_needs_a_dense_model_that_knows_something():
    rows = [row(spec, 0.0, retained=None, task=task) for task in ("t", "u") for spec in ("dense", "a@9")]
    (pivot,) = pivots(rows)
    assert {line.retained for line in pivot.lines} == {None} and pivot.lines[1].average == 0


def test_one_task_or_one_task_each_is_no_crossing():
    assert pivots([row("dense"), row("a@9")]) == []
    assert pivots([row("dense", task="t"), row("dense", model="n", task="u")]) == []


def test_csv_of_methods_and_tasks_holds_shares():
    found = results(*crossing())
    lines = list(csv.DictReader(io.StringIO(as_csv(NONE, found, Options("tasks", intervals=True)))))
    assert [line["model"] for line in lines] == ["m"] * 4 + ["n"] * 4
    a = next(line for line in lines if line["spec"] == "a@9")
    assert (a["lmms:z"], a["shapes"], a["retained"], a["keep"]) == ("0.4", "0.25", "0.5", "9")
    assert float(a["lmms:z_ci_low"]) == pytest.approx(0.35)
    lacking = next(line for line in lines if (line["model"], line["spec"]) == ("m", "b@9"))
    assert lacking["shapes"] == lacking["average"] == lacking["shapes_ci_low"] == ""
    assert "lmms:z_ci_low" not in as_csv(NONE, found, Options("tasks"))


def test_markdown_has_both_tables_or_one(run_folder):
    found = results(*crossing())
    both, across, rows = (as_markdown(NONE, found, Options(table)) for table in (None, "tasks", "rows"))
    assert [len(tables(text)) for text in (both, across, rows)] == [6, 2, 4]
    head, rule, *lines = tables(across)[1]
    assert head == ["spec", "z", "shapes", "average", "% of dense"] and rule == ["---", *["--:"] * 4]
    assert lines[3] == ["b@9", "**80.0**", "**50.0**", "**65.0**", "**100.0**"] and lines[2][1] == "40.0"
    assert "z (n = 40), shapes (n = 60)" in across and "[75.0, 85.0]" not in across
    assert "80.0** \\[75.0, 85.0\\]" in as_markdown(NONE, found, Options("tasks", intervals=True))


def test_markdown_tables_are_whole(run_folder, tmp_path):
    text = write_report(run_folder, out=tmp_path / "x.md").read_text()
    found = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert len(found) == 2
    for table in found:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert "seed=" not in text and "**SIMULATED" in text and "n = 80, chance 30.0 %" in text


# --- LaTeX ----------------------------------------------------------------------------------------


def tabular(text):
    """(column letters, cells of each line) of every table."""
    found = []
    for letters, body in re.findall(r"\\begin\{tabular\}\{(\w+)\}\n(.*?)\\end\{tabular\}", text, re.DOTALL):
        lines = [line.strip() for line in body.splitlines()]
        found.append(
            (letters, [line.removesuffix(r" \\").split(" & ") for line in lines if " & " in line], lines)
        )
    return found


def test_latex_crosses_methods_and_tasks_and_sets_budgets_apart():
    text = as_latex(NONE, results(*crossing()), Options())
    assert text.count("\\begin{table}") == text.count("\\end{table}") == 2
    letters, cells, lines = tabular(text)[1]
    assert letters == "lrrrr" and cells[0] == ["spec", "z", "shapes", "average", r"\% of dense"]
    assert cells[4] == [
        r"\texttt{b@9}",
        r"\textbf{80.0}",
        r"\textbf{50.0}",
        r"\textbf{65.0}",
        r"\textbf{100.0}",
    ]
    assert lines[0] == r"\toprule" and lines[-2 if lines[-1] == "" else -1] == r"\bottomrule"
    assert lines.count(r"\midrule") == 3  # dense, 36, 9
    assert "z (n = 40), shapes (n = 60)" in text and "In brackets" not in text
    assert "80.0} [75.0, 85.0]" in as_latex(NONE, results(*crossing()), Options(intervals=True))


def test_latex_of_one_task_has_the_columns_of_a_narrow_screen():
    rows = [row("dense", retained=1.0), row("random@9", 0.4, band=Band(("random(seed=0)@9",), 0.3, 0.5))]
    rows += [row("a@9", 0.7, retained=1.4, vs_random=difference(0.3), vs_dense=difference(-0.2), paper=0.5)]
    found = results(*rows, headline=[Headline("m", "t", ("f",), {}, {"f": 0.25}, 0.25)])
    text = as_latex(NONE, found, Options())
    ((letters, cells, _),) = tabular(text)
    assert cells[0] == [
        "spec",
        "tokens",
        r"accuracy, \%",
        r"\% of dense",
        "vs dense, points",
        "vs random, points",
    ]
    assert letters == "lrrrrr"
    assert cells[3] == [
        r"\texttt{a@9}",
        "9",
        r"\textbf{70.0}",
        "140",
        r"$-$20.0 $\downarrow$",
        r"+30.0 $\uparrow$",
    ]
    assert r"($n = 100$; chance 25.0\,\%)" in text
    assert "[65, 75]" in as_latex(NONE, found, Options(intervals=True))


def test_latex_prints_any_text_as_it_is():
    assert escape("50% of_a {b} & c#1 ~ ^ \\ $x$ <y>") == (
        r"50\% of\_a \{b\} \& c\#1 \textasciitilde{} \textasciicircum{} \textbackslash{} \$x\$ "
        r"\textless{}y\textgreater{}"
    )
    evil = row("a@9", model="x}\\input{/etc/passwd}\n\n%", task=EVIL)
    text = as_latex(
        NONE, results(row("dense", model=evil.model, task=EVIL), evil, note="one\n\\two"), Options()
    )
    assert "\\input" not in text and "% one \\two" in text.splitlines()
    assert not re.search(r"(?<!\\)%", text.replace("% needs", "").replace("% one", ""))
    assert re.search(r"\\label\{tab:[A-Za-z0-9-]+\}", text)


# --- plain values ---------------------------------------------------------------------------------


def test_rows_survive_their_json():
    one = row(
        "random@9", band=Band(("s", "t"), 0.1, 0.2), vs_dense=difference(0.1), official={"f1": float("inf")}
    )
    found = Results.read({"rows": [plain(one) | {"unknown": [1]}]}, "it")
    assert found.rows == (one,)
    assert set(plain(one)) == {field.name for field in fields(Row)}


def test_flat_values_have_the_same_names_for_all_rows():
    full = row("a@9", vs_dense=difference(0.1), band=Band(("s", "t"), 0.1, 0.2))
    assert list(flat(full)) == list(flat(row("b@9")))
    assert flat(full)["vs_dense_ci_high"] == pytest.approx(0.2) and flat(full)["band_seeds"] == "s t"
    assert flat(row("b@9"))["vs_dense_p"] is None
