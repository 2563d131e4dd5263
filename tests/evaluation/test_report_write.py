# SPDX-License-Identifier: Apache-2.0
"""Where a report is written: its format, its place, and what the command refuses."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlmprune.cli import app
from vlmprune.errors import EvaluationError, SpecError
from vlmprune.evaluation.report import FORMATS, Options, write_report

# --- where it is written --------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_the_suffix_is_the_format(run_folder, tmp_path, form):
    path = write_report(run_folder, out=tmp_path / f"mine.{form.upper()}")
    assert path == tmp_path / f"mine.{form.upper()}"
    assert path.read_bytes() == write_report(run_folder, form, tmp_path).read_bytes()


@pytest.mark.parametrize(
    ("form", "name", "message"),
    [
        (None, "report.pdf", "ends in '.pdf'; expected .html, .csv, .json, .md, .tex, or a folder"),
        ("csv", "report.pdf", "ends in '.pdf'"),
        ("csv", "report.md", "and the format 'csv' differ; give one of them"),
    ],
)
def test_another_suffix_is_refused_by_name(run_folder, tmp_path, form, name, message):
    with pytest.raises(SpecError, match=message):
        write_report(run_folder, form, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["new/deep", "new/", "new.d/"])
def test_a_folder_is_made_and_gets_the_report(run_folder, tmp_path, name):
    out = f"{tmp_path}/{name}"
    assert write_report(run_folder, out=out) == Path(out) / "report.html"
    assert write_report(run_folder, "csv", out) == Path(out) / "report.csv"
    assert sorted(path.name for path in Path(out).iterdir()) == ["report.csv", "report.html"]


def test_a_place_that_cannot_be_written_leaves_nothing(run_folder, tmp_path):
    with pytest.raises(EvaluationError, match="is no folder that is there; make it first"):
        write_report(run_folder, "csv", tmp_path / "no" / "such" / "folder.csv")
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(EvaluationError, match="taken cannot be made"):
        write_report(run_folder, "csv", tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("name", ["run.json", "results.json", "link.json"])
def test_a_report_does_not_replace_a_file_of_its_run(broken_run, name):
    (broken_run / "link.json").symlink_to(broken_run / "results.json")
    before = (broken_run / name).read_bytes()
    with pytest.raises(SpecError, match=rf"--out '.*{name}' is the file '.*json' itself, which would be"):
        write_report(broken_run, out=broken_run / name)
    assert (broken_run / name).read_bytes() == before


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EROFS, "choose another place with --out"), (errno.ENOSPC, "the disk is full: make room")],
)
def test_a_read_only_or_full_disk_is_one_clear_error(run_folder, tmp_path, monkeypatch, number, words):
    """Where nothing can be written, nothing can be removed either."""

    def refused(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    out = tmp_path / "old.csv"
    out.write_text("old")
    monkeypatch.setattr(Path, "write_text", refused)
    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(EvaluationError, match=rf"old\.csv cannot be written .*{words}"):
        write_report(run_folder, out=out)
    assert out.read_text() == "old"


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        ("csv", Options(table="taks"), "--table='taks' is unknown.*Did you mean 'tasks'"),
        ("html", Options(table="rows"), "--table rows is for csv, md and tex"),
        ("json", Options(intervals=True), "--intervals is for csv, md and tex"),
    ],
)
def test_options_that_a_format_does_not_take_are_refused(run_folder, tmp_path, form, options, message):
    with pytest.raises(SpecError, match=message):
        write_report(run_folder, form, tmp_path, options)


def test_methods_and_tasks_need_several_tasks(run_folder, tmp_path):
    with pytest.raises(EvaluationError, match=r"--table tasks compares several tasks .*has \['shapes'\]"):
        write_report(run_folder, "csv", tmp_path, Options(table="tasks"))


# --- the command ----------------------------------------------------------------------------------


def command(*words):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["report", *map(str, words)])


def test_the_command_writes_what_the_suffix_says(run_folder, tmp_path):
    done = command(run_folder, "--out", tmp_path / "table.tex", "--intervals")
    assert done.exit_code == 0 and f"wrote {tmp_path / 'table.tex'}" in done.stdout
    assert "In brackets: 95" in (tmp_path / "table.tex").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--out", "table.pdf"), "ends in '.pdf'; expected .html"),
        (("--out", "table.csv", "-f", "csv", "-f", "md"), "with 2 formats; expected a folder"),
        (("-f", "pdf"), "format='pdf' is unknown"),
        (("-f", "csv", "--table", "tasks"), "--table tasks compares several tasks"),
        (("--out", "/proc/nowhere/"), "cannot be made"),
    ],
)
def test_what_the_command_cannot_write_is_one_line(run_folder, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    done = command(run_folder, *words)
    assert done.exit_code == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
