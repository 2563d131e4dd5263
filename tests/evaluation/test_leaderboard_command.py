# SPDX-License-Identifier: Apache-2.0
"""``vlmprune leaderboard``: what it prints, what it ends with, and what it says when something is wrong."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from vlmprune.cli import app
from vlmprune.cli.leaderboard import _config, _engine
from vlmprune.cli.progress import Bars, Lines, progress
from vlmprune.errors import EvaluationError
from vlmprune.evaluation.leaderboard import run as sweeps
from vlmprune.evaluation.leaderboard import work
from vlmprune.evaluation.leaderboard.engines import Ray
from vlmprune.evaluation.leaderboard.process import Terminated
from vlmprune.evaluation.leaderboard.rundir import Run
from vlmprune.evaluation.report import write_report

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
        (("--specs", ""), "--specs '' has an empty entry; expected specs with commas between them"),
        (("--specs", " , "), "leave it out for the specs of the config"),
        (("--specs", "fastervlm@9,"), "'fastervlm@9,' has an empty entry.*: write --specs fastervlm@9"),
        (("--specs", "random(seed=1)@9,,pool@9"), r"write --specs 'random\(seed=1\)@9,pool@9'"),
        (("--repair", "mine.yaml"), "--repair got the config 'mine.yaml'; it repairs a folder as it is"),
        (("--engine", "rya"), "Did you mean 'ray'"),
        (("--address", "auto"), "add --engine ray"),
        (("--engine", "ray", "--task-cpus", "0"), "takes no CPU and no GPU"),
        (("nowhere.yaml",), "cannot be read"),
        (("--device", "cuda:99", "--specs", "fastervlm@9"), "device 'cuda:99' cannot be used"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, words, message):
    said = cli(*words, "--out", tmp_path / "run", code=2).stderr
    assert re.search(message, said) and said.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_interrupting_says_how_to_go_on(tmp_path, monkeypatch, raised, code):
    def interrupted(*args):
        raise raised

    monkeypatch.setattr(sweeps, "leaderboard", interrupted)
    assert "the same command goes on" in cli(*SMALL, "--out", tmp_path, code=code).stderr.replace("\n", " ")


def test_sigterm_ends_with_143_says_where_the_answers_are_and_loses_none(tmp_path):
    """As a log sees it: plain lines, no bars, no noise."""
    out, code = tmp_path / "run", "from vlmprune.cli import main; main()"
    words = ("--specs", "fastervlm@36,holov@36", "--limit", "64", "--batch-size", "8", "--out", str(out))
    command = [sys.executable, "-c", code, "leaderboard", *words]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while sum(path.stat().st_size > 0 for path in out.glob("cells/*.jsonl")) < 2:  # then the first is whole
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    child.terminate()
    stdout, stderr = child.communicate(timeout=120)
    assert child.returncode == 143 and stdout == ""
    first, last = stderr.splitlines()[0], stderr.splitlines()[-1]
    assert re.fullmatch(r"\d\d:\d\d:\d\d tiny on shapes: 0 of 576 answers are there", first)
    assert last == f"Stopped. All answers so far are in {out}; the same command goes on from there."
    assert not re.search("Loading weights|Warning|Traceback|DEBUG", stderr)
    assert sum(len(Run(out).journal(path.stem)) for path in out.glob("cells/*.jsonl")) > 0


def test_a_dense_model_alone_is_a_table_with_the_blind_one_and_a_page(tmp_path):
    result = cli("--specs", "dense", *SMALL[2:], "--out", tmp_path / "run")
    assert [line.split()[0] for line in result.stdout.splitlines() if line.startswith(" dense")] == ["dense"]
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert [(row["spec"], row["vs_random"]) for row in rows] == [("dense", None), ("blind", None)]
    assert write_report(tmp_path / "run").is_file()


@pytest.mark.parametrize("spec", ["random@9", "pool@9"])
def test_a_baseline_alone_is_a_table(tmp_path, spec):
    rows = json.loads(cli("--specs", spec, *SMALL[2:], "--out", tmp_path / "run", "--json").stdout)["rows"]
    assert {"dense", "random@9", "uniform@9", "pool@9"} <= {row["spec"] for row in rows}


def test_a_method_without_a_budget_meets_baselines_at_what_it_reads(tmp_path):
    result = cli("--specs", "pyramiddrop,dense", *SMALL[2:], "--out", tmp_path / "run")
    assert "Against random tokens" in result.stdout and "pyramiddrop" in result.stdout
    rows = {row["spec"]: row for row in json.loads((tmp_path / "run" / "results.json").read_text())["rows"]}
    mine = rows["pyramiddrop"]
    share = mine["layer_tokens"] / mine["dense_tokens"]
    budgets = {row["keep"] for row in rows.values()} - {None}
    assert 0.3 < share < 0.7 and budgets == {str(round(share, 3))}
    (budget,) = budgets
    for name in (f"random(seed=2)@{budget}", f"random@{budget}", f"uniform@{budget}", f"pool@{budget}"):
        assert abs(rows[name]["realised_tokens"] - mine["layer_tokens"]) <= 1
    assert mine["vs_random"] and mine["keep"] == budget  # so that it stands beside them
    random = rows[f"random@{budget}"]["accuracy"]
    assert mine["vs_random"]["difference"] == pytest.approx(mine["accuracy"] - random)
    assert json.loads(
        cli("--specs", "pyramiddrop,dense", *SMALL[2:], "--out", tmp_path / "run", "--json").stdout
    )


def test_a_failing_dense_model_gives_every_row_its_reason(tmp_path, monkeypatch):
    def fails(model, processor, samples, specs, task, **options):
        for record in original(
            model, processor, samples, [spec for spec in specs if spec != "dense"], task, **options
        ):
            if specs[0] == "dense":
                raise EvaluationError("")
            yield record

    original = work.evaluate
    monkeypatch.setattr(work, "evaluate", fails)
    said = cli("--specs", "uniform@9", *SMALL[2:], "--out", tmp_path / "run", code=2).stderr
    reasons = dict(line.split(": ", 1) for line in said.splitlines()[1:])
    assert {name.strip() for name in reasons} >= {"dense", "uniform@9", "pool@9", "random(seed=0)@9"}
    assert reasons["  dense"] == "EvaluationError" and "since dense failed" in reasons["  pool@9"]
    assert not (tmp_path / "run" / "results.json").exists()


def test_another_config_is_refused_then_replaces_and_tells_what_else_is_there(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    words = ("--specs", "divprune@18", *SMALL[2:], "--out", folder)
    said = cli(*words, code=2).stderr
    assert "specs: fastervlm@9, random(seed=7)@9 there, divprune@18 here" in said and said.count("\n") == 1
    lines = cli(*words, "--replace").stdout.splitlines()
    assert lines[-2].startswith("Also in the folder, in no table: 7 cells of other configs or versions (")
    assert "fastervlm@9" in lines[-2]


def test_repair_says_what_it_did(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    said = cli("--repair", "--out", folder).stdout
    assert said == f"{folder}: 90 answers are sound; there was nothing to repair\n"
    (folder / "run.json").write_text("")
    lines = cli("--repair", "--out", folder).stdout.splitlines()
    assert "run.json was missing or broken" in lines[0] and lines[1] == f"{folder}: 90 answers are sound"
    (folder / "run.json").unlink()
    found = json.loads(cli("--repair", "--out", folder, "--json").stdout)
    assert found["answers"] == 90 and len(found["repaired"]) == 1
    assert "got no folder" in cli("--repair", code=2).stderr


def test_a_folder_that_cannot_be_written_is_one_line(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    (folder / ".lock").unlink()
    (folder / ".lock").mkdir()  # refused for every user
    for words in (SMALL, ("--repair",)):
        said = cli(*words, "--out", folder, code=2).stderr
        assert "cannot be written" in said and said.count("\n") == 1


def test_a_spec_without_a_row_is_named_and_ends_with_1(run):
    result = cli(
        "--specs", "fastervlm@9,fastervlm(layer=99)@9", *SMALL[2:], "--out", run[0], "--replace", code=1
    )
    assert "no row for fastervlm(layer=99)@9" in result.stdout.replace("\n", " ")


def test_options_change_a_config(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("models: [tiny]\nspecs: [holov@9]\nlimit: 5\n")
    assert _config(path, None, False, {"limit": None}).limit == 5
    assert _config(path, None, False, {"limit": 7, "batch_size": 2}).batch_size == 2
    assert [str(spec) for spec in _config(path, "random(seed=1)@9, pool@9", False, {}).specs] == [
        "random(seed=1)@9",
        "pool@9",
    ]


@pytest.mark.parametrize(
    ("written", "given", "asked"),
    [("limit: 5", None, 5), ("limit: 1000", None, 400), ("", None, 400), ("limit: 5", 7, 7)],
)
def test_quick_asks_no_more_than_a_config_says_and_keeps_its_budgets(tmp_path, written, given, asked):
    path = tmp_path / "mine.yaml"
    path.write_text(f"models: [tiny]\nspecs: [holov@9, holov@18]\n{written}\n")
    config = _config(path, None, True, {"limit": given})
    assert config.limit == asked and [str(spec) for spec in config.specs] == ["holov@9", "holov@18"]
    assert _config(None, None, True, {"limit": given}).limit == (given or 400)


def test_a_task_takes_a_gpu_only_on_a_gpu():
    assert _engine("ray", None, "cuda:0", 2, None) == Ray(None, 2, 1)
    assert _engine("ray", "auto", "cpu", 1, None) == Ray("auto", 1, 0)
    assert _engine("ray", None, "cuda", 1, 0.5) == Ray(None, 1, 0.5)


# --- progress -------------------------------------------------------------------------------------


def test_a_log_gets_a_line_at_the_start_one_a_minute_and_one_for_every_whole_cell(capsys):
    now = [0.0]
    lines = Lines(lambda: now[0])
    lines.begin("tiny on shapes", 400, 100)
    for second in range(1, 151):  # two answers a second
        now[0] = second
        lines.advance(2)
    lines.ended("pool@9")
    lines.note("mended")
    captured = capsys.readouterr()
    assert captured.out == "" and "\x1b" not in captured.err
    told = [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in captured.err.splitlines()]
    assert told == [
        "tiny on shapes: 100 of 400 answers are there",
        "tiny on shapes: 220 of 400 answers (55%), about 2 min left",
        "tiny on shapes: 340 of 400 answers (85%), about 0 min left",
        "tiny on shapes: pool@9 is whole",
        "note: mended",
    ]


def test_a_terminal_gets_bars_and_a_log_gets_lines(monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    assert isinstance(progress(), Bars)
    monkeypatch.setenv("TTY_COMPATIBLE", "0")
    assert isinstance(progress(), Lines)


def test_every_cell_is_told_once_when_it_is_whole(run, tmp_path):
    told = cli("--specs", "fastervlm@9", *SMALL[2:], "--out", tmp_path / "run").stderr.splitlines()
    ended = [line.split(": ")[1].removesuffix(" is whole") for line in told if line.endswith("is whole")]
    assert len(ended) == len({*ended}) == 8 and {"dense", "blind", "fastervlm@9", "pool@9"} <= {*ended}
    again = cli("--specs", "fastervlm@9", *SMALL[2:], "--out", tmp_path / "run").stderr.splitlines()
    assert len(again) == 1 and again[0].endswith("tiny on shapes: 80 of 80 answers are there")
