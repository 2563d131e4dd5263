# SPDX-License-Identifier: Apache-2.0
"""The leaderboard on a terminal: what fits, what the legend says, and streams that lack letters."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from report_rows import difference, row
from rich.console import Console

from vlmprune.cli import board, screen
from vlmprune.evaluation.report.columns import COLUMNS
from vlmprune.evaluation.report.table import used
from vlmprune.evaluation.report.verdict import limits, verdict
from vlmprune.evaluation.stats.summary import Band, Hard, Headline
from vlmprune.plain import plain


def shown(results, width, **options):
    """Lines of the screen."""
    console = Console(width=width, record=True, file=io.StringIO(), **options)
    board.show(results, console)
    return console.export_text().splitlines()


@pytest.fixture(scope="module")
def results(run_folder):
    return json.loads((run_folder / "results.json").read_text()) | {"failed": []}


@pytest.mark.parametrize("width", [170, 120, 100, 80, 60, 40])
def test_a_narrow_screen_loses_columns_and_no_spec(results, width):
    lines = shown(results, width)
    assert max(map(len, lines)) <= width
    for spec in ("fastv(layer=2)@36", "zooprune@9", "random@36"):
        assert sum(line.split()[:1] == [spec] for line in lines) == 2  # two models
    assert not any("seed=" in line for line in lines)
    words = " ".join(" ".join(lines).split())
    wanted = {
        "accuracy,": 40,
        "random,": 60,
        "family,": 80,
        "dense,": 100,
        "tokens": 80,
        "hard,": 120,
        "same": 170,
    }
    heads = " ".join(lines[: next(i for i, line in enumerate(lines) if line.split()[:1] == ["dense"])])
    assert {word: word in heads.split() for word in wanted} == {
        w: width >= least for w, least in wanted.items()
    }
    assert "Against random tokens" in words


@pytest.mark.parametrize("width", [200, 120, 100, 80, 60, 40])
def test_the_legend_explains_columns_that_are_shown_and_all_that_need_it(results, width):
    console = Console(width=width)
    rows = [row("dense"), row("a@9", hard=Hard(3, 0.5), vs_random=difference(0.1)), row("random@9")]
    rows = [replace(one, pictures=1.1, layer_tokens=40.0, dense_tokens=144.0) for one in rows]
    columns = board.fitting(COLUMNS, rows, console)
    lines = board.legend(columns, rows)
    assert len(lines) <= 6
    titles = {column.title.partition(",")[0] for column in columns}
    explained = {line.partition(":")[0] for line in lines}
    needed = {"query", "tokens", "tokens per layer", "vs random", "vs random at equal cost", "hard"}
    assert explained == titles & needed
    assert len({line.partition(":")[0] for line in lines}) == len(lines)  # a line each


def test_arrows_are_explained_once_whatever_is_compared():
    both = [row("dense"), row("a@9", vs_random=difference(0.1), vs_dense=difference(-0.1))]
    alone = [row("dense"), row("var", vs_dense=difference(-0.2))]
    for rows, title in ((both, "vs random"), (alone, "vs dense")):
        columns = board.fitting(used(COLUMNS, rows), rows, Console(width=100))
        (line,) = [line for line in board.legend(columns, rows) if "Holm-corrected" in line]
        assert line.startswith(f"{title}:")


def test_tokens_are_explained_where_questions_show_several_pictures():
    rows = [row("dense", realised_tokens=158.4, dense_tokens=158.4, pictures=1.1), row("a@9")]
    named = {column.key: column for column in COLUMNS}
    read, layers = named["realised_tokens"], named["layer_tokens"]
    (tokens,) = board.legend([read], rows)
    assert tokens == "tokens: read per question, which shows 1.1 pictures of 144 on average"
    assert board.legend([read], [replace(one, pictures=1.0) for one in rows]) == []
    inside = row("fastv@32", realised_tokens=35.2, layer_tokens=66.0, dense_tokens=144.0)
    assert read.brief(inside) == "35.2" and layers.brief(inside) == "66"
    assert layers.text(inside) == "66 (46 %)"  # of what the unpruned model reads
    assert "a late cut costs more" in board.legend([layers], [inside])[0]
    assert board.legend([layers], [replace(inside, layer_tokens=35.2)]) == []


def test_what_a_table_rests_on_stands_above_it(results):
    text = " ".join(" ".join(shown(results, 120)).split())
    assert "model-a on shapes: 80 questions about 67 sets of pictures, chance 30.0 %" in text
    assert "bold" not in text  # a file has none
    assert "in bold the highest of a budget" in " ".join(shown(results, 200, force_terminal=True))


def test_a_run_without_headline_and_with_failures_is_shown(results):
    lost = {"spec": "mine@9", "model": "model-a", "task": "shapes", "error": "out of memory"}
    text = "\n".join(shown(results | {"headline": [], "failed": [lost]}, 120))
    assert "no row for mine@9 (model-a, shapes): out of memory" in text
    assert "questions about 67 sets of pictures; in brackets" in text  # and no chance level


# --- several tasks --------------------------------------------------------------------------------

TASKS = ("shapes", "lmms:gqa", "lmms:textvqa_val_ocr", "lmms:pope")


def several(tasks=TASKS):
    rows = []
    for number, task in enumerate(tasks):
        for spec, accuracy in (("dense", 0.8), ("random@9", 0.4), ("a@9", 0.6 + number / 20)):
            rows.append(row(spec, accuracy=accuracy, retained=accuracy / 0.8, task=task, n=100 + number))
    return {"rows": plain(rows), "headline": []}


@pytest.mark.parametrize("width", [120, 80, 60, 40])
def test_several_tasks_end_in_one_table_in_the_order_of_the_config(width):
    lines = shown(several(), width)
    assert max(map(len, lines)) <= width
    start = next(i for i, line in enumerate(lines) if line.startswith("m, all tasks"))
    text = " ".join(" ".join(lines[start:]).split())
    assert "shapes (n = 100), gqa (n = 101), textvqa_val_ocr (n = 102), pope (n = 103)" in text
    heads = [
        word for word in text.split(")")[-1].split() if word in ("shapes", "gqa", "textvqa_val_ocr", "pope")
    ]
    assert heads == ["shapes", "gqa", "textvqa_val_ocr", "pope"]
    numbers = [word for line in lines[start:] for word in line.split()[1:] if line.split()[:1] == ["a@9"]]
    assert numbers == ["60.0", "65.0", "70.0", "75.0", "67.5", "84.4"]
    blocks = sum(line.split()[:1] == ["a@9"] for line in lines[start:])
    assert (blocks == 1) == (width >= 80)


def test_one_task_has_no_table_of_tasks():
    assert not any("all tasks" in line for line in shown(several(TASKS[:1]), 100))


# --- sentences ------------------------------------------------------------------------------------


def test_the_sentence_names_every_method_once_a_side():
    rows = [row("dense"), row("random@9"), row("c@9", vs_random=difference(-0.3))]
    rows += [row(spec, vs_random=difference(0.2)) for spec in ("a@9", "a@4", "b@9")]
    rows += [row("b@4", vs_random=difference(0.0))]
    text = verdict(rows)
    assert "better: a, b (9); no different: b (4); worse: c." in text and "In brackets" in text
    assert "In brackets" not in verdict(rows[:4])
    assert verdict(rows[:2]) == "No row has random tokens of its own budget to be compared with."


def test_single_seeds_are_not_in_the_sentence():
    seed = row("random(seed=0)@9", vs_random=difference(0.3))
    band = row("random@9", band=Band(("random(seed=0)@9",), 0.1, 0.2))
    assert verdict([seed, band]).startswith("No row has random tokens")


def test_the_smallest_difference_is_a_range_over_the_rows():
    rows = [row("random@9", mdd=0.071), row("a@9", mdd=0.01), row("dense", mdd=None)]
    (sentence,) = limits(rows, None)
    assert sentence.startswith(
        "Differences to dense below 1.0 to 7.1 points, depending on the row, would be missed"
    )
    assert "below about 1.0 points would" in limits(rows[1:], None)[0]


def test_what_makes_numbers_weak_is_said():
    few = [row("a@9", clusters=9)]
    (said,) = limits(few, None)
    assert said == "With only 9 sets of pictures the intervals are wide, and near 0 and 100 % too short."
    assert limits([row("a@9", clusters=10)], None) == []
    nothing = Headline("m", "t", (), {"f": "why"})
    assert limits([row("a@9")], nothing) == [
        "The dense model has learnt none of the families, so these accuracies mean nothing."
    ]
    some = Headline("m", "t", ("g",), {"f": "why"})
    assert limits([row("a@9")], some) == ["Not counted, since the dense model has not learnt them: f."]


# --- streams that lack letters --------------------------------------------------------------------

SHOW = """
import json, sys
from vlmprune.cli import board, screen
screen.speak_plainly()
board.show(json.load(open(sys.argv[1])), screen.stdout())
print("\\N{SNOWMAN} \\N{HORIZONTAL ELLIPSIS}")
assert "transformers" not in sys.modules, "seconds of imports to show a table"
"""


@pytest.mark.parametrize(
    ("encoding", "minus", "arrow"),
    [
        ("ascii", "-", "^"),
        pytest.param("latin-1", "-", "^", marks=pytest.mark.slow),
        pytest.param("cp1252", "-", "^", marks=pytest.mark.slow),
        ("utf-8", "\N{MINUS SIGN}", "\N{UPWARDS ARROW}"),
    ],
)
def test_a_stream_that_lacks_letters_gets_others(tmp_path, encoding, minus, arrow):
    path = tmp_path / "results.json"
    rows = [row("dense"), row("random@9", band=Band(("random(seed=0)@9",), 0.1, 0.2)), row("a@9")]
    rows[2] = replace(rows[2], vs_random=difference(0.3), vs_dense=difference(-0.2, p=0.5))
    path.write_text(json.dumps({"rows": plain(rows)}))
    env = os.environ | {"PYTHONIOENCODING": encoding, "COLUMNS": "90"}
    done = subprocess.run([sys.executable, "-c", SHOW, str(path)], env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    text = done.stdout.decode(encoding)
    assert f"{minus}20.0" in text and f"+30.0 {arrow}" in text
    down = "\N{DOWNWARDS ARROW}" if encoding == "utf-8" else "v"
    assert f"{arrow}{down} where Holm-corrected p < 0.05" in text  # legend and cells agree
    assert text.splitlines()[-1] == {"utf-8": "☃ …", "cp1252": "? …"}.get(encoding, "? ...")


def test_the_command_itself_writes_anything():
    """The console script sets the streams up, before any command runs."""
    script = shutil.which("vlmprune", path=os.path.dirname(sys.executable))
    if script is None:
        pytest.skip("the console script is not installed beside this interpreter")
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([script, "report", "no\N{SNOWMAN}where"], env=env, capture_output=True)
    assert done.returncode == 2 and b"no?where" in done.stderr


def test_what_stands_in_tables_is_replaced_by_one_ascii_letter():
    """Or columns would not stand below one another."""
    for letter in "\N{EN DASH}\N{MINUS SIGN}\N{UPWARDS ARROW}\N{DOWNWARDS ARROW}\N{MULTIPLICATION SIGN}":
        error = UnicodeEncodeError("ascii", letter, 0, 1, "")
        text, end = screen._plain_character(error)
        assert len(text) == 1 and text.isascii() and end == 1
