# SPDX-License-Identifier: Apache-2.0
"""Publishing a run: numbers and what they were measured with, no text of a data set, nothing unrepeatable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from simulated_run import EVIL, simulate
from typer.testing import CliRunner

from vlmprune.cli import app
from vlmprune.evaluation.leaderboard.published import FOLDER, Published
from vlmprune.evaluation.leaderboard.rundir import cell_id, encode_line

runner = CliRunner()
TABLE = """
about: LLaVA-1.5-7B
tokens: 144
columns: {shapes: shapes, mme: null}
entries:
  - spec: holov@36
    source: arXiv:2510.02912
    values: {shapes: 55.3}
"""


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None], spec: str | None = None) -> Path:
    """Change recipes, of one spec or of all, as if the run had been made so."""
    results = json.loads((folder / "results.json").read_text())
    for row in results["rows"]:
        old = row["fingerprint"]
        if old is None or spec not in (None, row["spec"]):
            continue
        recipe = json.loads((folder / "cells" / f"{old}.json").read_text())
        change(recipe)
        new = row["fingerprint"] = cell_id(recipe)
        (folder / "cells" / f"{old}.json").unlink()
        (folder / "cells" / f"{new}.json").write_text(json.dumps(recipe))
        lines = (folder / "cells" / f"{old}.jsonl").read_bytes().split(b"\n")[:-1]
        (folder / "cells" / f"{old}.jsonl").unlink()
        values = [{key: value for key, value in json.loads(line).items() if key != "sum"} for line in lines]
        (folder / "cells" / f"{new}.jsonl").write_bytes(b"".join(encode_line(new, value) for value in values))
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture(scope="module")
def _real(tmp_path_factory):
    folder = simulate(
        tmp_path_factory.mktemp("publish") / "run", samples=24, budgets=(36,), resamples=100, speed=False
    )
    return rewrite(folder, lambda recipe: recipe.update(weights="commit 0a1b2c", limit=None))


@pytest.fixture
def real(tmp_path, _real):
    """A run that looks as if a checkpoint of the hub had answered all questions; a test may change it."""
    return Path(shutil.copytree(_real, tmp_path / "real"))


def test_rows_are_put_behind_those_that_are_there(real, tmp_path):
    path = tmp_path / "table.yaml"
    path.write_text(TABLE)
    done = runner.invoke(app, ["publish", str(real), "--into", str(path)])
    assert done.exit_code == 0, done.output
    assert path.read_text().startswith(TABLE)  # comments and order of the others stay
    found = Published.load(path)
    results = json.loads((real / "results.json").read_text())
    means = {row["spec"]: row for row in results["rows"] if "seed=" not in row["spec"]}
    mine = {entry.spec: entry for entry in found.entries if entry.measured}
    assert set(mine) == set(means) and f"{len(means)} new rows" in done.output
    for spec, entry in mine.items():
        assert entry.values["shapes"] == pytest.approx(100 * means[spec]["accuracy"], abs=0.006)
        assert entry.ci["shapes"] == pytest.approx([100 * end for end in means[spec]["ci"]], abs=0.006)
        assert entry.average == pytest.approx(100 * means[spec]["retained"], abs=0.006)
        assert (
            entry.measured["weights"] == "commit 0a1b2c"
            and entry.measured["questions"]["shapes"] == means[spec]["n"]
        )
    assert len(mine["random@36"].measured["cells"]) == 3  # those of its seeds
    # what was measured here is no number of a paper
    assert (
        found.find("holov@36", "shapes") == pytest.approx(0.553)
        and found.find("divprune@36", "shapes") is None
    )
    again = runner.invoke(app, ["publish", str(real), "--into", str(path)])
    assert "0 new rows" in again.output and Published.load(path) == found


def test_no_text_of_a_data_set_gets_out(real):
    done = runner.invoke(app, ["publish", str(real)])
    assert done.exit_code == 0, done.output
    text = done.stdout
    for path in (real / "cells").glob("*.jsonl"):
        for line in path.read_bytes().split(b"\n")[:-1]:
            sample = json.loads(line)
            assert sample["id"] not in text
            assert len(sample["answer"]) < 4 or sample["answer"] not in text
    assert EVIL not in text and "command" not in text and str(real.parent) not in text
    (first, *_) = yaml.safe_load(text)
    assert set(first) == {"spec", "source", "values", "ci", "average", "note", "measured"}


def test_a_new_table_has_a_column_for_each_task(real, tmp_path):
    path = tmp_path / "new.yaml"
    assert runner.invoke(app, ["publish", str(real), "--into", str(path)]).exit_code == 0
    found = Published.load(path)
    assert found.tasks == {"shapes": "shapes"} and found.tokens == 144 and found.entries[0].spec == "dense"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "9f86d081"}, "which nobody else can find; expected an HF id"),
        ({"limit": 24}, "was asked 24 questions; expected all of a split"),
        ({"plugins": {"mine": "abc"}}, "the method 'mine' does not come with the package"),
    ],
)
def test_what_others_could_not_measure_again_is_refused(real, tmp_path, change, message):
    rewrite(real, lambda recipe: recipe.update(change))
    done = runner.invoke(app, ["publish", str(real), "--into", str(tmp_path / "new.yaml")])
    assert done.exit_code == 2 and message in " ".join(done.output.split())
    assert not (tmp_path / "new.yaml").exists()


def test_a_run_that_fails_validation_is_refused(run_folder, broken_run, tmp_path):
    done = runner.invoke(app, ["publish", str(run_folder)])
    assert done.exit_code == 2 and "publish one checkpoint at a time" in done.output
    results = json.loads((broken_run / "results.json").read_text())
    results["rows"][0]["failed"] = 3
    (broken_run / "results.json").write_text(json.dumps(results))
    done = runner.invoke(app, ["publish", str(broken_run)])
    assert done.exit_code == 2 and "generations failed" in done.output


def test_a_table_that_cannot_take_rows_stays_as_it_is(real, tmp_path):
    path = tmp_path / "table.yaml"
    other = TABLE.replace("{shapes: shapes, mme: null}", "{shapes: null, mme: null}")
    turned = "entries: []\nabout: x\ncolumns: {shapes: shapes}\n"
    for text, message in ((other, "none is in both"), (turned, "expected `entries:` as its last key")):
        path.write_text(text)
        done = runner.invoke(app, ["publish", str(real), "--into", str(path)])
        assert done.exit_code == 2 and message in " ".join(done.output.split()), done.output
        assert path.read_text() == text
    assert runner.invoke(app, ["publish", str(real), "--into", str(tmp_path / "x.txt")]).exit_code == 2


def test_tables_of_the_package_can_take_rows(tmp_path):
    """Their entries stand at the end, so that lines may be put behind them."""
    for path in sorted(FOLDER.glob("*.yaml")):
        text = path.read_text() + '  - {spec: dense, source: x, average: 100, measured: {cells: ["0"]}}\n'
        assert (
            len(Published.of(path.name, yaml.safe_load(text)).entries)
            == len(Published.load(path).entries) + 1
        )
