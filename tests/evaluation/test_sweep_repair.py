# SPDX-License-Identifier: Apache-2.0
"""Run folders that were damaged, or hold something else: what mends itself, what is refused and kept."""

from __future__ import annotations

import json
import shutil

import pytest
from sweep_tools import ROWS, SPECS, comparable, config, journals, sweep

from vlmprune.errors import EvaluationError
from vlmprune.evaluation.leaderboard.config import Config
from vlmprune.evaluation.leaderboard.journal import cells_of
from vlmprune.evaluation.leaderboard.repair import repair
from vlmprune.evaluation.leaderboard.run import Settings, Silent, leaderboard
from vlmprune.evaluation.leaderboard.rundir import Run
from vlmprune.evaluation.report import write_report
from vlmprune.evaluation.report.load import Results


class Notes(Silent):
    """Remembers what the user is told."""

    def __init__(self):
        self.texts = []

    def note(self, text):
        self.texts.append(text)


def again(model, out, **changes):
    """The same sweep; returns its results and what it told."""
    notes = Notes()
    return leaderboard(config(model, **changes), out, None, notes), notes.texts


def results(out):
    return json.loads((out / "results.json").read_text())


def cell_of(out, spec):
    return next(cell for cell in cells_of(out) if Run(out).recipe(cell)["spec"] == spec)


def snapshot(out):
    """All files but the name of the process that was there last."""
    return {
        path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".holder.json"
    }


@pytest.fixture
def unanswered(monkeypatch):
    """Raises when a question is asked."""

    def fail(*args, **options):
        raise AssertionError("a question was asked again")

    monkeypatch.setattr("vlmprune.evaluation.leaderboard.work.evaluate", fail)


# --- run.json -------------------------------------------------------------------------------------

BROKEN = {
    "empty": "",
    "truncated": '{"format": 2, "ver',
    "no object": "[]",
    "binary": "\0\0\0",
    "format lost": '{"fosmat": 2}',
    "format no number": '{"format": "2"}',
    "missing": None,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_run_json_mends_itself(small_model, finished, unanswered, kind):
    first, path = results(finished), finished / "run.json"
    path.unlink()
    if BROKEN[kind] is not None:
        path.write_text(BROKEN[kind])
    (finished / "notes.txt").write_text("mine")  # cells tell a run from other folders, whatever else is there
    found, told = again(small_model, finished)
    assert comparable(found) == comparable(first)
    assert len(told) == 1 and "run.json was missing or broken, and is written anew" in told[0]
    info = json.loads(path.read_text())
    assert info["repaired"] and Config.of(info["config"]).specs == config(small_model).specs
    assert write_report(finished).is_file()
    assert (
        again(small_model, finished)[1] == [] and json.loads(path.read_text())["repaired"] == info["repaired"]
    )


@pytest.mark.parametrize("kind", BROKEN)
def test_repair_writes_run_json_from_the_cells(finished, unanswered, kind):
    before = Config.of(json.loads((finished / "run.json").read_text())["config"])
    (finished / "run.json").unlink()
    if BROKEN[kind] is not None:
        (finished / "run.json").write_text(BROKEN[kind])
    with pytest.raises(EvaluationError, match=r"leaderboard --repair --out"):
        Run.open(finished)
    told = []
    assert repair(finished, told.append) == 9 * 20
    assert len(told) == 1 and "run.json was missing or broken" in told[0]
    after = Config.of(json.loads((finished / "run.json").read_text())["config"])
    for name in (
        "models",
        "tasks",
        "split",
        "limit",
        "batch_size",
        "max_new_tokens",
        "positions",
        "dtype",
        "seeds",
    ):
        assert getattr(after, name) == getattr(before, name), name
    assert set(map(str, after.specs)) == set(ROWS[:-1])
    assert write_report(finished).is_file()


def test_repair_does_not_choose_between_two_configs(small_model, finished):
    sweep(small_model, finished, Settings(replace=True), limit=10)
    recipes = {cell: Run(finished).recipe(cell) for cell in cells_of(finished)}
    two = [cell for cell, recipe in recipes.items() if recipe["spec"] == "pool@9"]
    assert len(two) == 2
    for cell in two:  # which config a cell is of is seen by its hash
        (finished / "cells" / f"{cell}.json").unlink()
    repair(finished, print)
    assert all(Run(finished).recipe(cell) == recipes[cell] for cell in two)
    (finished / "run.json").write_text("")
    with pytest.raises(
        EvaluationError, match=r"several configs \(limit 20 and 10\): run the leaderboard command whose"
    ):
        repair(finished, print)
    rows = again(small_model, finished, limit=10)[0]["rows"]  # the remedy works
    assert rows[0]["n"] <= 10 and repair(finished, print)


def test_another_format_is_not_repaired(finished):
    for path in (finished / "run.json",):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))
    with pytest.raises(EvaluationError, match="holds a run of format 1, written by"):
        repair(finished, print)


def test_what_is_no_run_is_not_repaired(tmp_path):
    (tmp_path / "cells").mkdir()
    with pytest.raises(EvaluationError, match="holds no cells, so there is nothing to repair"):
        repair(tmp_path, print)
    (tmp_path / "cells").rmdir()
    (tmp_path / "run.json").write_text('{"name": "of another program"}')
    for act in (lambda: repair(tmp_path, print), lambda: sweep("tiny", tmp_path)):
        with pytest.raises(
            EvaluationError, match=r"run.json is not that of a run, and no cells lie beside it"
        ):
            act()
    assert (tmp_path / "run.json").read_text() == '{"name": "of another program"}'


def test_a_sound_run_has_nothing_to_repair(finished):
    before, told = snapshot(finished), []
    assert repair(finished, told.append) == 180 and told == []
    assert snapshot(finished) == before


# --- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["empty", "truncated", "edited", "missing"])
@pytest.mark.parametrize("how", ["by itself", "repair"])
def test_a_broken_recipe_is_noticed_and_mended(small_model, finished, unanswered, kind, how):
    path = finished / "cells" / f"{cell_of(finished, 'pool@9')}.json"
    before = path.read_bytes()
    path.unlink()
    if kind != "missing":
        text = {"empty": b"", "truncated": before[:50], "edited": before.replace(b"pool@9", b"pool@8")}[kind]
        path.write_bytes(text)
        with pytest.raises(
            EvaluationError, match=r"run the same leaderboard command again, which writes it anew"
        ):
            Run(finished).recipe(path.stem)
    if how == "repair":
        told = []
        repair(finished, told.append)
        assert len(told) == 1 and "it is that of pool@9 and is written anew" in told[0]
    else:
        told = again(small_model, finished)[1]
        assert len(told) == (kind != "missing") and all(
            "was damaged, and is written anew" in text for text in told
        )
    assert json.loads(path.read_text()) == json.loads(before)


def test_a_recipe_that_nothing_shows_is_named_and_its_command_mends_it(small_model, finished, unanswered):
    for cell in cells_of(finished):
        (finished / "cells" / f"{cell}.json").write_text("{}")
    told = []
    repair(finished, told.append)
    assert len(told) == 9 and all("no other cell shows what it was" in text for text in told)
    first = results(finished)
    assert comparable(again(small_model, finished)[0]) == comparable(first)


# --- journals -------------------------------------------------------------------------------------


def test_broken_lines_are_set_aside_and_asked_again(small_model, finished, tmp_path):
    whole, first = journals(finished), results(finished)
    path = finished / "cells" / f"{cell_of(finished, 'pool@9')}.jsonl"
    data = bytearray(path.read_bytes())
    ends = [at for at, byte in enumerate(data) if byte == 10]
    data[ends[2] + 30] ^= 4
    data[ends[9] + 90] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        EvaluationError, match=r"line 4 does not match its checksum.* \(and 1 more lines\); `vlmprune leader"
    ):
        sweep(small_model, finished)
    told = []
    assert repair(finished, told.append) == 178
    assert len(told) == 1 and "2 of 20 lines are left out (line 4 does not match" in told[0]
    assert path.with_name(f"{path.name}.broken-1").read_bytes() == data  # nothing is thrown away
    assert len(path.read_bytes().splitlines()) == 18
    assert comparable(again(small_model, finished)[0]) == comparable(first) and journals(finished) == whole
    path.write_bytes(b"broken\n")
    repair(finished, told.append)
    assert path.with_name(f"{path.name}.broken-2").read_bytes() == b"broken\n"


def test_sound_samples_that_the_task_does_not_have_are_the_fault_of_the_task(small_model, finished):
    """A flipped bit never gets that far: its line is refused before."""
    from vlmprune.evaluation.leaderboard.rundir import encode_line

    cell = cell_of(finished, "dense")
    with (finished / "cells" / f"{cell}.jsonl").open("ab") as file:
        file.write(encode_line(cell, Run(finished).journal(cell)[0] | {"id": "strange"}))
    with pytest.raises(EvaluationError, match=r"holds sample 'strange'.*its line is whole.*report the task"):
        sweep(small_model, finished)


# --- results of another config --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"specs": ["divprune@18"]}, r"specs: fastervlm@9, fastv\(layer=2\)@9 there, divprune@18 here"),
        ({"specs": [SPECS[0]]}, r"specs: fastv\(layer=2\)@9 there"),
        ({"seeds": [0, 1, 7]}, "seeds: 2 there, 7 here"),
        ({"limit": 10}, "limit: 20 there, 10 here"),
        ({"batch_size": 4}, "batch_size: 8 there, 4 here"),
        ({"positions": "original"}, "positions: None there, original here"),
        ({"specs": ["holov@9"], "limit": 10}, r"specs: .* holov@9 here; limit: 20 there, 10 here"),
    ],
    ids=str,
)
def test_results_of_another_config_are_not_replaced(small_model, finished, unanswered, changes, difference):
    before = snapshot(finished)
    with pytest.raises(EvaluationError, match=rf"another config \({difference}\).*--out, or say --replace"):
        sweep(small_model, finished, **changes)
    assert snapshot(finished) == before


def test_results_of_another_config_are_replaced_when_asked_and_come_back(small_model, finished):
    first = results(finished)
    found = sweep(small_model, finished, Settings(replace=True), specs=["divprune@18"])
    assert results(finished)["config"]["specs"] == ["divprune@18"]
    kept = {one["spec"]: (one["task"], one["answers"]) for one in found["other_cells"]}
    assert kept == dict.fromkeys(ROWS[2:-1], ("shapes", 20))  # dense and blind are in both tables
    with pytest.raises(EvaluationError, match="holds the results of another config"):
        sweep(small_model, finished)
    assert comparable(sweep(small_model, finished, Settings(replace=True))) == comparable(first)


def test_a_config_that_asks_for_more_needs_no_permission(small_model, finished):
    found = sweep(small_model, finished, specs=[*SPECS, "divprune@18", "random@9"], seeds=[0, 1, 2, 3])
    specs = [row["spec"] for row in found["rows"]]
    assert {*ROWS, "divprune@18", "random(seed=3)@9", "uniform@18"} <= set(specs) and found[
        "other_cells"
    ] == []
    sweep(
        small_model, finished, specs=[*SPECS, "divprune@18"], seeds=[0, 1, 2, 3]
    )  # random@9 is there all the same


def test_another_device_or_code_of_the_model_is_another_config(small_model, finished):
    for settings, difference in (
        (Settings(trust_remote_code=True), "trust_remote_code: False there, True here"),
    ):
        with pytest.raises(EvaluationError, match=difference):
            sweep(small_model, finished, settings)


def test_a_run_that_was_killed_before_it_had_results_may_be_another_one(small_model, finished):
    (finished / "results.json").unlink()
    found = sweep(small_model, finished, specs=["divprune@18"])
    assert {one["spec"] for one in found["other_cells"]} == set(ROWS[2:-1])


def test_broken_results_are_computed_anew(small_model, finished, unanswered):
    first = results(finished)
    for text in ("", "{}", '{"config": 3}', '{"config": {"specs": 5, "models": null}}'):
        (finished / "results.json").write_text(text)
        if "specs" in text:
            with pytest.raises(EvaluationError, match="limit: None there, 20 here"):
                sweep(small_model, finished)
            continue
        told = []
        repair(finished, told.append)
        assert len(told) == (text == "")
        assert comparable(again(small_model, finished)[0]) == comparable(first)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"rows": 3}'])
def test_a_broken_speed_card_says_what_to_do(finished, text):
    (finished / "speed.json").write_text(text)
    with pytest.raises(
        EvaluationError, match=r"speed.json .*; measure it again with `vlmprune bench --out .*, or delete"
    ):
        Results.of(Run.open(finished))


def test_the_config_decides_and_not_the_name_of_the_folder(small_model, finished, tmp_path):
    moved = shutil.move(finished, tmp_path / "elsewhere")
    (moved / "run.json").unlink()  # the results say themselves what they answer
    with pytest.raises(EvaluationError, match="holds the results of another config"):
        sweep(small_model, moved, specs=["divprune@18"])
