# SPDX-License-Identifier: Apache-2.0
"""``vlmprune leaderboard``: what it prints, what it ends with, and what it says when something is wrong."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vlmprune.benchmarks import sweep as sweeps
from vlmprune.benchmarks.sweep.engines import Ray
from vlmprune.benchmarks.sweep.verdict import side, verdict
from vlmprune.cli import app, board
from vlmprune.cli.leaderboard import _config, _engine

COLUMNS = 100
SMALL = ("--specs", "fastervlm@9,random(seed=7)@9", "--limit", "10", "--batch-size", "10")


def cli(*words, code=0):
    result = CliRunner(env={"COLUMNS": str(COLUMNS), "NO_COLOR": "1"}).invoke(app, ["leaderboard", *map(str, words)])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command") / "run"
    return folder, cli(*SMALL, "--out", folder)


def test_a_table_a_sentence_and_where_the_samples_are(run):
    folder, result = run
    lines = result.stdout.splitlines()
    assert max(map(len, lines[:-1])) <= COLUMNS  # the last names the folder, to be copied
    for spec in ("dense", "random@9", "uniform@9", "pool@9", "fastervlm@9"):
        assert sum(line.split()[:1] == [spec] for line in lines) == 1, spec
    text = " ".join(lines)
    assert "Against random tokens" in text and f"vlmprune report {folder}" in text
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert {"spec", "model", "task", "n", "accuracy", "families", "realised_tokens"} <= set(rows[0])


def test_json_is_all_that_stdout_holds_and_a_second_run_is_the_same(run):
    folder, _ = run
    before = json.loads((folder / "results.json").read_text())
    found = json.loads(cli(*SMALL, "--out", folder, "--json").stdout)
    assert found["rows"] == before["rows"]
    assert json.loads((folder / "run.json").read_text())["created"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--specs", "fasterlvm@9"), "Did you mean 'fastervlm'"),
        (("--specs", "fastervlm"), "has no budget"),
        (("--engine", "rya"), "Did you mean 'ray'"),
        (("--address", "auto"), "add --engine ray"),
        (("nowhere.yaml",), "cannot be read"),
        (("--device", "cuda:99", "--specs", "fastervlm@9"), "device 'cuda:99' cannot be used"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, words, message):
    assert message in cli(*words, "--out", tmp_path / "run", code=2).stderr.replace("\n", " ")


def test_interrupting_says_how_to_go_on(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweeps, "leaderboard", interrupted)
    assert "the same command goes on" in cli(*SMALL, "--out", tmp_path, code=130).stderr.replace("\n", " ")


def test_a_spec_without_a_row_is_named_and_ends_with_1(run):
    result = cli("--specs", "fastervlm@9,fastervlm(layer=99)@9", *SMALL[2:], "--out", run[0], code=1)
    assert "no row for fastervlm(layer=99)@9" in result.stdout.replace("\n", " ")


def test_options_change_a_config(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("models: [tiny]\nspecs: [holov@9]\nlimit: 5\n")
    assert _config(path, None, False, {"limit": None}).limit == 5
    assert _config(path, None, False, {"limit": 7, "batch_size": 2}).batch_size == 2
    assert _config(path, None, True, {"limit": None}).limit == _config(None, None, True, {}).limit
    assert [str(spec) for spec in _config(path, "random(seed=1)@9, pool@9", False, {}).specs] == ["random(seed=1)@9", "pool@9"]


def test_a_task_takes_a_gpu_only_on_a_gpu():
    assert _engine("ray", None, "cuda:0", 2, None) == Ray(None, 2, 1)
    assert _engine("ray", "auto", "cpu", 1, None) == Ray("auto", 1, 0)
    assert _engine("ray", None, "cuda", 1, 0.5) == Ray(None, 1, 0.5)


# --- the table ---------------------------------------------------------------------------------------------------------------


def test_all_rows_of_a_large_run_stand_on_one_line_of_100_columns(run_folder):
    screen = Console(width=COLUMNS, record=True, file=io.StringIO())
    results = json.loads((run_folder / "results.json").read_text()) | {"failed": []}
    board.show(results, screen)
    lines = screen.export_text().splitlines()
    assert max(map(len, lines)) <= COLUMNS
    for spec in ("fastv(layer=2)@36", "zooprune@9", "random@36"):
        assert sum(line.split()[:1] == [spec] for line in lines) == 2  # two models
    assert not any("seed=" in line for line in lines)


@pytest.mark.parametrize("width", [120, 100, 80, 60, 40])
def test_a_narrow_screen_loses_columns_and_no_spec(run_folder, width):
    screen = Console(width=width, record=True, file=io.StringIO())
    board.show(json.loads((run_folder / "results.json").read_text()) | {"failed": []}, screen)
    lines = screen.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert sum(line.split()[:1] == ["fastv(layer=2)@36"] for line in lines) == 2
    heading = next(line for line in lines if line.split()[:1] == ["spec"])
    assert "accuracy" in heading and ("worst family" in heading) == (width >= 80) and ("hard" in heading) == (width >= 100)


def row(spec, difference=None, half=0.1, p=0.01):
    method, _, keep = spec.partition("@")
    against = difference is not None and {"difference": difference, "ci": [difference - half, difference + half], "p_holm": p}
    return {"spec": spec, "model": "m", "task": "t", "method": method, "keep": keep, "band": None, "vs_random": against or None}


def test_a_difference_counts_only_beyond_its_interval_and_its_correction():
    assert side(row("a@9", 0.2)["vs_random"]) == "better"
    assert side(row("a@9", -0.2)["vs_random"]) == "worse"
    assert side(row("a@9", 0.05)["vs_random"]) == side(row("a@9", 0.2, p=0.2)["vs_random"]) == "no different"


def test_the_sentence_names_every_method_once_a_side():
    rows = [row("dense"), row("a@9", 0.2), row("a@4", 0.2), row("b@9", 0.2), row("b@4", 0.0), row("c@9", -0.3), row("random@9")]
    text = verdict(rows)
    assert "better: a, b (9); no different: b (4); worse: c." in text and "In brackets" in text
    assert "In brackets" not in verdict(rows[:3])
    assert verdict(rows[:1]) == "No row has random tokens of its own budget to be compared with."
