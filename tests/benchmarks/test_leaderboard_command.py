# SPDX-License-Identifier: Apache-2.0
"""``vlmprune leaderboard``: what it prints, what it ends with, and what it says when something is wrong."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from vlmprune.benchmarks import sweep as sweeps
from vlmprune.benchmarks.sweep.engines import Ray
from vlmprune.cli import app
from vlmprune.cli.leaderboard import _config, _engine

COLUMNS = 100
SMALL = ("--specs", "fastervlm@9,random(seed=7)@9", "--limit", "10", "--batch-size", "10")


def cli(*words, code=0):
    result = CliRunner(env={"COLUMNS": str(COLUMNS), "NO_COLOR": "1"}).invoke(
        app, ["leaderboard", *map(str, words)]
    )
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
    assert [str(spec) for spec in _config(path, "random(seed=1)@9, pool@9", False, {}).specs] == [
        "random(seed=1)@9",
        "pool@9",
    ]


def test_a_task_takes_a_gpu_only_on_a_gpu():
    assert _engine("ray", None, "cuda:0", 2, None) == Ray(None, 2, 1)
    assert _engine("ray", "auto", "cpu", 1, None) == Ray("auto", 1, 0)
    assert _engine("ray", None, "cuda", 1, 0.5) == Ray(None, 1, 0.5)
