# SPDX-License-Identifier: Apache-2.0
"""Reports: what is refused and how that is told, and what the files of each format hold."""

from __future__ import annotations

import csv
import html.parser
import io
import json

import pytest
from simulated_run import EVIL, simulate, write

from vlmprune.errors import EvaluationError, SpecError
from vlmprune.evaluation.leaderboard.rundir import Run, cell_id, decode_lines, encode_line
from vlmprune.evaluation.report import FORMATS, write_report
from vlmprune.evaluation.report.load import Results

# what a row must have; the rest may be missing, as in runs of older versions
NEEDED = {"spec", "model", "task", "method", "keep", "n", "accuracy", "ci", "families", "realised_tokens"}
NEEDED |= {"failed", "empty", "firings", "band", "fingerprint"}


def edit(folder, change):
    path = folder / "results.json"
    results = json.loads(path.read_text())
    change(results)
    write(path, results)


def row_of(results, spec="fastervlm@36", model="model-a"):
    return next(row for row in results["rows"] if (row["spec"], row["model"]) == (spec, model))


def edit_journal(folder, change, spec="fastervlm@36"):
    cell = row_of(Run.open(folder).results, spec)["fingerprint"]
    path = folder / "cells" / f"{cell}.jsonl"
    lines, _ = decode_lines(cell, path.read_bytes())
    change(lines)
    path.write_bytes(b"".join(encode_line(cell, line) for line in lines))


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"failed": 3}, r"3 of \d+ generations failed"),
        ({"empty": 9}, r"9 of \d+ answers are empty"),
        ({"firings": 0}, "no hook fired"),
        ({"fingerprint": None}, "names no cell"),
        ({"fingerprint": "0" * 16}, "cannot be read"),
        ({"n": 10**6}, "its journal has 80"),
        ({"n": 0}, "n is 0"),
        ({"accuracy": 1.5}, r"accuracy 1.5 with the interval .*expected shares from 0 to 1"),
        ({"ci": [0.9, 0.1]}, r"with the interval \[0.9, 0.1\]; expected"),
        ({"realised_tokens": -3}, "tokens -3.0"),
    ],
)
def test_a_row_that_fails_validation_is_named(broken_run, changes, message):
    edit(broken_run, lambda results: row_of(results).update(changes))
    with pytest.raises(EvaluationError, match=message) as caught:
        write_report(broken_run)
    assert "'fastervlm@36' on 'shapes' with 'model-a'" in str(caught.value)
    assert not (broken_run / "report.html").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ci": "wide"}, "ci is 'wide'; expected a list of 2"),
        ({"ci": [0.1, "high"]}, r"ci\[1\] is 'high'; expected a finite number"),
        ({"ci": [0.1, 0.2, 0.3]}, "expected a list of 2"),
        ({"accuracy": "0.5"}, "accuracy is '0.5'; expected a finite number"),
        ({"accuracy": None}, "accuracy is None; expected a finite number"),
        ({"accuracy": float("nan")}, "accuracy is nan; expected a finite number"),
        ({"accuracy": 10**400}, "accuracy is 1000.*expected a finite number"),
        ({"accuracy": True}, "accuracy is True; expected a finite number"),
        ({"n": 79.5}, "n is 79.5; expected a whole number"),
        ({"paper": "=HYPERLINK(1)"}, r"paper is '=HYPERLINK\(1\)'; expected a finite number"),
        ({"families": [1]}, r"families is \[1\]; expected an object"),
        ({"families": {"text": "all"}}, r"families\['text'\] is 'all'; expected a finite number"),
        ({"vs_dense": {"p": 0.1}}, r"vs_dense lacks \['difference', 'ci', 'p_holm', 'mdd'\]"),
        ({"band": {"seeds": [1], "low": 0, "high": 1}}, r"band: seeds\[0\] is 1; expected text"),
    ],
)
def test_a_row_that_cannot_be_read_is_named_with_its_field(broken_run, changes, message):
    edit(broken_run, lambda results: row_of(results).update(changes))
    with pytest.raises(EvaluationError, match=message) as caught:
        write_report(broken_run, "csv")
    assert "'fastervlm@36', 'shapes', 'model-a'" in str(caught.value)
    assert "run the leaderboard again, it recomputes results.json" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda results: row_of(results).pop("families"), r"lacks \['families'\]"),
        (lambda results: results.update(rows={}), "results.json has no rows"),
        (lambda results: results.update(rows="none"), "rows is 'none'; expected a list"),
        (lambda results: results.update(rows=[7]), r"rows\[0\] is 7; expected an object"),
        (lambda results: results.update(provenance="mine"), "provenance is 'mine'; expected an object"),
        (lambda results: results["headline"][0].pop("families"), r"headline\[0\] .*lacks \['families'\]"),
        (
            lambda results: results.update(failed=[{"spec": "a"}]),
            r"failed\[0\] .*lacks \['model', 'task', 'error'\]",
        ),
        (
            lambda results: results["speed"][0].pop("device"),
            r"speed\[0\] \('dense', 'model-a'\) lacks \['device'\]",
        ),
        (
            lambda results: results["speed"][0].update(first_token_s="fast"),
            "first_token_s is 'fast'; expected a finite",
        ),
        (
            lambda results: results["speed"][0].update(tokens_per_layer=[1, None]),
            r"tokens_per_layer\[1\] is None",
        ),
    ],
)
def test_results_that_cannot_be_read_say_where(broken_run, change, message):
    edit(broken_run, change)
    with pytest.raises(EvaluationError, match=message):
        write_report(broken_run)


def test_a_speed_file_that_is_none_says_what_to_do(broken_run):
    write(broken_run / "speed.json", {"conditions": {}})
    with pytest.raises(
        EvaluationError, match=r"speed.json lacks a list of rows; measure it again with `vlmprune bench --out"
    ):
        write_report(broken_run)


def test_many_problems_are_counted_and_twenty_are_shown(broken_run):
    edit(broken_run, lambda results: [row.update(ci=None) for row in results["rows"]])
    with pytest.raises(EvaluationError) as caught:
        write_report(broken_run)
    rows = len(json.loads((broken_run / "results.json").read_text())["rows"])
    assert f"{rows} problems" in str(caught.value) and str(caught.value).endswith(f"and {rows - 20} more")


def test_all_bad_rows_are_named_at_once(broken_run):
    def change(results):
        row_of(results)["failed"] = 1
        row_of(results, "holov@9", "model-b")["empty"] = 9

    edit(broken_run, change)
    with pytest.raises(EvaluationError, match="fastervlm@36") as caught:
        write_report(broken_run, "csv")
    assert "holov@9" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[0].update(answer="  "), "empty 0 but 1 in its journal"),
        (lambda lines: lines[0].update(error="CUDA out of memory"), "failed 0 but 1 in its journal"),
        (lambda lines: lines[0].update(firings=0), "firings .* in its journal"),
        (lambda lines: lines.append(lines[0] | {"answer": "x"}), "once more, and otherwise"),
        (lambda lines: lines.pop(), "answered 79 questions, .* 80, not the same ones"),
    ],
)
def test_results_that_say_more_than_the_journals_are_stale(broken_run, change, message):
    edit_journal(broken_run, change)
    with pytest.raises(EvaluationError, match=message):
        write_report(broken_run)


def test_an_answer_that_stands_there_twice_is_one(broken_run):
    before = write_report(broken_run, "csv").read_text()
    edit_journal(broken_run, lambda lines: lines.append(lines[0]))
    assert write_report(broken_run, "csv").read_text() == before


def test_an_edited_recipe_is_found(broken_run):
    cell = row_of(Run.open(broken_run).results)["fingerprint"]
    recipe = Run.open(broken_run).recipe(cell)
    write(broken_run / "cells" / f"{cell}.json", recipe | {"weights": "others"})
    with pytest.raises(EvaluationError, match="it was edited"):
        write_report(broken_run)


def test_rows_of_other_weights_are_not_compared(broken_run):
    old = row_of(Run.open(broken_run).results)["fingerprint"]
    recipe = Run.open(broken_run).recipe(old) | {"weights": "others"}
    write(broken_run / "cells" / f"{cell_id(recipe)}.json", recipe)
    lines = Run.open(broken_run).journal(old)
    data = b"".join(encode_line(cell_id(recipe), line) for line in lines)
    (broken_run / "cells" / f"{cell_id(recipe)}.jsonl").write_bytes(data)
    edit(broken_run, lambda results: row_of(results).update(fingerprint=cell_id(recipe)))
    with pytest.raises(
        EvaluationError, match=r"differs from that of 'dense' in \['weights'\].*not comparable"
    ):
        write_report(broken_run)


def test_a_torn_last_line_is_passed_over_and_a_broken_one_is_not(broken_run):
    run = Run.open(broken_run)
    cell = row_of(run.results)["fingerprint"]
    assert len(run.journal(cell)) == 80  # the simulation leaves an incomplete last line in every journal
    path = broken_run / "cells" / f"{cell}.jsonl"
    path.write_text("{broken\n" + path.read_text())
    with pytest.raises(EvaluationError, match="line 1 has no checksum"):
        write_report(broken_run)


@pytest.mark.parametrize("name", ["run.json", "results.json"])
def test_a_run_of_another_version_is_refused(broken_run, name):
    write(broken_run / name, json.loads((broken_run / name).read_text()) | {"format": 99})
    with pytest.raises(EvaluationError, match=r"format 99.*reads format 2"):
        write_report(broken_run)


def test_what_is_no_run_is_told(tmp_path):
    with pytest.raises(EvaluationError, match=r"holds no run\.json"):
        write_report(tmp_path)
    with pytest.raises(EvaluationError, match="is no folder"):
        write_report(tmp_path / "nothing")


def test_an_unknown_format_is_told_with_the_nearest(run_folder):
    with pytest.raises(SpecError, match="Did you mean 'html'"):
        write_report(run_folder, "htm")


# --- what is written ------------------------------------------------------------------------------


class Links(html.parser.HTMLParser):
    """Everything a browser would fetch, and every tag."""

    def __init__(self):
        super().__init__()
        self.found, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.found += [
            value for name, value in attrs if name in ("src", "href", "srcset", "action", "poster", "data")
        ]


@pytest.fixture(scope="module")
def text(run_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return {form: write_report(run_folder, form, out).read_text(encoding="utf-8") for form in FORMATS}


def test_the_page_refers_to_nothing_outside(text):
    links = Links()
    links.feed(text["html"])
    assert [url for url in links.found if not url.startswith(("data:", "#"))] == []
    assert links.tags.count("script") == 1
    assert "@import" not in text["html"] and "url(" not in text["html"]


def test_text_of_models_is_escaped_in_every_format_that_renders_it(text):
    for form in ("html", "md"):
        assert EVIL not in text[form] and "&lt;script&gt;" in text[form]


def test_sections_say_what_they_should(text):
    page = text["html"]
    for words in (
        "SIMULATED",
        "Hardest hit",
        "gainst the ideal",
        "firings",
        "fastv(layer=2)@9",
        "3 seeds",
        "Apache-2.0",
    ):
        assert words in page
    assert page.count("<svg") == 2 * 8  # a panel for every method of both models
    assert page.count("data:image/jpeg") >= page.count("<article") == 48
    assert "chance: the best guess without a look" in page and page.count("accuracy, %</text>") == 2 * 8


def test_cells_without_an_answer_are_named_on_the_page(broken_run):
    error = {"spec": "mine@9", "model": "model-a", "task": "shapes", "error": "<b>out of memory</b>"}
    edit(broken_run, lambda results: results.update(failed=[error]))
    page = write_report(broken_run).read_text()
    assert "Not in this report: mine@9 on shapes with model-a" in page and "&lt;b&gt;out of memory" in page


def test_csv_holds_every_row_and_number(text, run_folder):
    rows = list(csv.DictReader(io.StringIO(text["csv"])))
    given = Run.open(run_folder).results["rows"]
    assert len(rows) == len(given)
    known = {(row["model"], row["spec"]): row for row in given}
    for row in rows:
        source = known[row["model"], row["spec"]]
        assert float(row["accuracy"]) == source["accuracy"] and float(row["ci_low"]) == source["ci"][0]
        assert float(row["family_text"]) == source["families"]["text"]
        difference = "" if source["vs_dense"] is None else str(source["vs_dense"]["difference"])
        assert row["vs_dense_difference"] == difference
        assert row["band_seeds"] == " ".join(source["band"]["seeds"] if source["band"] else [])
    assert len({tuple(row) for row in rows}) == 1 and "ci" not in rows[0] and "vs_dense" not in rows[0]


def test_json_holds_rows_speed_and_provenance(text, run_folder):
    content = json.loads(text["json"])
    given = Run.open(run_folder).results
    by_name = {(row["model"], row["spec"]): row for row in content["rows"]}
    assert by_name == {(row["model"], row["spec"]): row for row in given["rows"]}
    assert content["headline"] == given["headline"] and content["provenance"] == given["provenance"]
    for shown, row in zip(content["speed"], given["speed"], strict=True):
        assert shown.items() >= row.items()


def test_formulas_are_inert_in_a_spreadsheet(broken_run):
    def change(results):
        for row in results["rows"]:
            row["positions"] = "=HYPERLINK(1)"
            row["families"]["@family"] = 0.5

    edit(broken_run, change)
    rows = list(csv.DictReader(io.StringIO(write_report(broken_run, "csv").read_text())))
    assert {row["positions"] for row in rows} == {"'=HYPERLINK(1)"} and rows[0]["family_@family"] == "0.5"


def test_one_budget_makes_one_chart_with_a_line_for_every_spec(tmp_path):
    folder = simulate(tmp_path / "run", samples=20, budgets=(18,), speed=False, resamples=100)
    page = write_report(folder).read_text()
    assert "Nothing was timed in this run" in page and page.count("<svg") == 1
    assert (
        page.count('class="dot') == 9 and page.count("pooling</span>") == 0
    )  # the legend names what is drawn


def test_a_real_run_has_no_note_and_may_lack_what_is_optional(broken_run):
    def change(results):
        results["provenance"] = {}
        del results["headline"], results["speed"]
        for row in results["rows"]:
            for key in set(row) - NEEDED:
                row.pop(key)

    edit(broken_run, change)
    assert "banner" not in write_report(broken_run).read_text().partition("<body>")[2]
    for form in ("csv", "json", "md", "tex"):
        assert write_report(broken_run, form).stat().st_size > 1000


def test_speed_of_its_own_file_wins(broken_run):
    run = Run.open(broken_run)
    assert len(Results.of(run).speed) == 6
    write(broken_run / "speed.json", {"rows": run.results["speed"][:1], "conditions": {}})
    assert len(Results.of(run).speed) == 1
