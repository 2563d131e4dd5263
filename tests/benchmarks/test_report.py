# SPDX-License-Identifier: Apache-2.0
"""Reports: what is refused and how that is told, and what the files of each format hold."""

from __future__ import annotations

import base64
import csv
import html.parser
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from simulated_run import EVIL, simulate, write

from vlmprune.benchmarks.report import FORMATS, write_report
from vlmprune.benchmarks.report.charts import panels
from vlmprune.benchmarks.report.gallery import _drawn
from vlmprune.benchmarks.report.table import badges, is_best, series
from vlmprune.benchmarks.rundir import Run, cell_id, decode_lines, encode_line
from vlmprune.errors import EvaluationError, SpecError


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


# --- what is refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"failed": 3}, r"3 of \d+ generations failed"),
        ({"empty": 2}, r"2 of \d+ answers are empty"),
        ({"firings": 0}, "no hook fired"),
        ({"fingerprint": None}, "names no cell"),
        ({"fingerprint": "0" * 16}, "cannot be read"),
        ({"accuracy": None}, "lacks \\['accuracy'\\]"),
        ({"n": 10**6}, "its journal has 80"),
    ],
)
def test_a_row_that_cannot_be_believed_is_named(broken_run, changes, message):
    edit(broken_run, lambda results: row_of(results).update(changes))
    with pytest.raises(EvaluationError, match=message) as caught:
        write_report(broken_run)
    assert "'fastervlm@36' on 'shapes' with 'model-a'" in str(caught.value)
    assert not (broken_run / "report.html").exists()


def test_all_bad_rows_are_named_at_once(broken_run):
    def change(results):
        row_of(results)["failed"] = 1
        row_of(results, "holov@9", "model-b")["empty"] = 1

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
        (lambda lines: lines.append(lines[0]), "twice"),
        (lambda lines: lines.pop(), "answered 79 questions, .* 80, not the same ones"),
    ],
)
def test_results_that_say_more_than_the_journals_are_stale(broken_run, change, message):
    edit_journal(broken_run, change)
    with pytest.raises(EvaluationError, match=message):
        write_report(broken_run)


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
    with pytest.raises(EvaluationError, match=r"differs from that of 'dense' in \['weights'\].*not comparable"):
        write_report(broken_run)


def test_a_torn_last_line_is_passed_over_and_a_broken_one_is_not(broken_run):
    run = Run.open(broken_run)
    cell = row_of(run.results)["fingerprint"]
    assert len(run.journal(cell)) == 80  # the simulation leaves a torn line in every journal
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


def test_a_place_that_cannot_be_written_leaves_nothing(run_folder, tmp_path):
    with pytest.raises(EvaluationError, match="cannot be written"):
        write_report(run_folder, "csv", tmp_path / "no" / "such" / "folder.csv")


# --- what is written --------------------------------------------------------------------------------------------------------


class Links(html.parser.HTMLParser):
    """Everything a browser would fetch, and every tag."""

    def __init__(self):
        super().__init__()
        self.found, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "poster", "data")]


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
    for words in ("SIMULATED", "Hardest hit", "gainst the ideal", "firings", "fastv(layer=2)@9", "3 seeds", "Apache-2.0"):
        assert words in page
    assert page.count("<svg") == 2 * 8  # a panel for every method of both models
    assert page.count("data:image/jpeg") >= page.count("<article") > 20


def test_tiles_stand_side_by_side_and_what_no_token_covers_is_striped():
    image = Image.new("RGB", (60, 40), (200, 30, 30))  # wider than the model's view
    kept = [{"keep_idx": [0, 9], "grids": [[2, 2], [2, 4]], "view": "center"}]
    (uri,) = _drawn([image], kept, "sample")
    drawn = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")
    scale = drawn.height // 40
    assert drawn.height >= 288 and drawn.width > 2 * 60 * scale  # two panels and a gap
    red, green, _ = drawn.getpixel((12 * scale, 2 * scale))  # inside the first kept patch
    assert red > 150 and green < 80
    beside = np.asarray(drawn)[:, : 5 * scale].astype(int)  # left of the centred square: no picture, two greys
    assert (abs(beside[..., 0] - beside[..., 1]) < 25).mean() > 0.9 and beside[..., 0].std() > 5


def test_kept_patches_of_another_number_of_pictures_are_refused():
    with pytest.raises(EvaluationError, match="shows 1 images, its journal has kept patches of 2"):
        list(_drawn([Image.new("RGB", (8, 8))], [{}, {}], "sample"))


def test_cells_without_an_answer_are_named_on_the_page(broken_run):
    error = {"spec": "mine@9", "model": "model-a", "task": "shapes", "error": "<b>out of memory</b>"}
    edit(broken_run, lambda results: results.update(failed=[error]))
    page = write_report(broken_run).read_text()
    assert "Not in this report: mine@9 on shapes with model-a" in page and "&lt;b&gt;out of memory" in page


def test_questions_that_changed_since_are_not_drawn(broken_run, monkeypatch):
    from vlmprune.benchmarks.shapes import ShapesTask

    monkeypatch.setattr(ShapesTask, "fingerprint", "another")
    page = write_report(broken_run).read_text()
    assert "its questions are not those of the run any more" in page and "data:image/jpeg" not in page and "<article" in page


def test_csv_holds_every_row_and_number(text, run_folder):
    rows = list(csv.DictReader(io.StringIO(text["csv"])))
    given = Run.open(run_folder).rows
    assert len(rows) == len(given)
    known = {(row["model"], row["spec"]): row for row in given}
    for row in rows:
        source = known[row["model"], row["spec"]]
        assert float(row["accuracy"]) == source["accuracy"] and float(row["ci_low"]) == source["ci"][0]
        assert float(row["family_text"]) == source["families"]["text"]
        assert row["vs_dense_difference"] == ("" if source["vs_dense"] is None else str(source["vs_dense"]["difference"]))


def test_json_holds_rows_speed_and_provenance(text, run_folder):
    content = json.loads(text["json"])
    run = Run.open(run_folder)
    assert sorted(map(str, content["rows"])) == sorted(map(str, run.rows))
    assert content["speed"] == run.speed and content["provenance"] == run.provenance


def test_markdown_tables_are_whole(text):
    tables = re.findall(r"(?:^\|.*\|\n)+", text["md"], re.MULTILINE)
    assert len(tables) == 2
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1
    assert "seed=" not in text["md"] and "**SIMULATED" in text["md"]


def test_formulas_are_inert_in_a_spreadsheet(broken_run):
    def change(results):
        for row in results["rows"]:
            row["paper"] = "=HYPERLINK(1)"

    edit(broken_run, change)
    rows = list(csv.DictReader(io.StringIO(write_report(broken_run, "csv").read_text())))
    assert {row["paper"] for row in rows} == {"'=HYPERLINK(1)"}


def test_one_budget_and_no_speed_still_make_a_page(tmp_path):
    folder = simulate(tmp_path / "run", samples=20, budgets=(18,), speed=False, resamples=100)
    page = write_report(folder).read_text()
    assert "Nothing was timed in this run" in page and page.count("<svg") == 8


def test_a_real_run_has_no_note_and_may_lack_what_is_optional(broken_run):
    def change(results):
        results["provenance"] = {}
        del results["headline"], results["speed"]
        for row in results["rows"]:
            for key in ("groups", "worst", "hard", "mdd", "vs_random", "on_object", "agreement", "flips", "paper"):
                row.pop(key, None)

    edit(broken_run, change)
    assert "banner" not in write_report(broken_run).read_text().partition("<body>")[2]
    for form in ("csv", "json", "md"):
        assert write_report(broken_run, form).stat().st_size > 1000


def test_speed_of_its_own_file_wins(broken_run):
    write(broken_run / "speed.json", {"rows": Run.open(broken_run).speed[:1], "conditions": {}})
    assert len(Run.open(broken_run).speed) == 1


# --- judgements -------------------------------------------------------------------------------------------------------------


def candidate(spec, low, high, **more):
    middle = (low + high) / 2
    method, _, keep = spec.partition("@")
    return {"spec": spec, "model": "m", "task": "t", "method": method, "keep": keep or None, "accuracy": middle, "ci": [low,
    high],
            "realised_tokens": 36.0, "band": None, **more}  # fmt: skip


def test_best_needs_an_interval_above_all_others():
    rows = [candidate("a@36", 0.70, 0.80), candidate("b@36", 0.60, 0.69), candidate("random@36", 0.4, 0.5)]
    assert [is_best(row, rows) for row in rows] == [True, False, False]
    rows[1]["ci"][1] = 0.71  # overlaps
    assert not any(is_best(row, rows) for row in rows)
    assert not is_best(candidate("c@9", 0.9, 0.95), [candidate("c@9", 0.9, 0.95)][:0])  # alone is not best
    assert not is_best(candidate("dense", 0.9, 1.0), rows)


@pytest.mark.parametrize(
    ("p", "difference", "badge"), [(0.04, 0.1, "beats random"), (0.04, -0.1, "below random"), (0.06, 0.1, None)]
)
def test_a_badge_needs_a_corrected_p_value(p, difference, badge):
    row = candidate("a@36", 0.5, 0.6, vs_random={"difference": difference, "ci": [0, 1], "p": 0.01, "p_holm": p})
    assert [text for _, text in badges(row, [row])] == ([badge] if badge else [])


@pytest.mark.parametrize(
    ("spec", "name"),
    [("a@36", "a"), ("debias+fastv(layer=2)@0.25/crop", "debias+fastv(layer=2)"), ("var+a@9", "var+a"), ("dense", "dense")],
)
def test_a_curve_is_a_spec_without_its_budget(spec, name):
    assert series(spec) == name


def test_points_lie_where_the_numbers_are():
    rows = [candidate("dense", 0.8, 0.9), candidate("a@36", 0.5, 0.7), candidate("a@9", 0.3, 0.5, realised_tokens=9.0)]
    (panel,) = panels(rows)
    dots = [tuple(map(float, found)) for found in re.findall(r'class="dot" cx="([\d.]+)" cy="([\d.]+)"', panel.svg)]
    assert len(dots) == 2
    (x9, y9), (x36, y36) = dots
    assert x9 < x36 and y9 > y36  # fewer tokens to the left, lower accuracy further down
    assert panel.svg.count("<title>") == 2 and "a@9: 40.0 % [30.0, 50.0] at 9 tokens" in panel.svg
