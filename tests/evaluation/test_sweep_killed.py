# SPDX-License-Identifier: Apache-2.0
"""Sweeps that are killed: nothing is lost, nothing is doubled, and nobody writes beside another."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import time

import pytest
from sweep_tools import comparable, config, in_child, journals, sweep

from vlmprune.errors import EvaluationError
from vlmprune.evaluation.leaderboard.journal import locked
from vlmprune.evaluation.leaderboard.run import Silent, leaderboard
from vlmprune.evaluation.leaderboard.rundir import Run

KILLS = [15, pytest.param(50, marks=pytest.mark.slow)]
CHANGES = {"limit": 24, "batch_size": 4}
FORK = multiprocessing.get_context("fork")  # imports and the model are there at once


def size(out):
    return sum(path.stat().st_size for path in out.glob("cells/*.jsonl"))


def kill(child, out, chance, begun):
    """At any moment of the start, or once it writes."""
    if chance.random() < 0.5:
        time.sleep(chance.uniform(0, begun))
    else:
        before = size(out)
        while child.is_alive() and size(out) == before:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))
    child.kill()
    child.join()


@pytest.mark.parametrize("kills", KILLS)
def test_kills_lose_nothing_and_double_nothing(small_model, tmp_path, kills):
    """Each run goes on where the last was killed."""
    reference = sweep(small_model, tmp_path / "whole", **CHANGES)
    started = time.perf_counter()
    sweep(small_model, tmp_path / "whole", **CHANGES)
    begun = time.perf_counter() - started  # of a run that has nothing to answer
    answered, out = journals(tmp_path / "whole"), tmp_path / "killed"
    chance, counts = random.Random(0), [0]
    for _ in range(kills):
        child = FORK.Process(target=in_child, args=(small_model, out), kwargs=CHANGES)
        child.start()
        kill(child, out, chance, begun)
        found = journals(out)  # no line twice
        for spec, lines in found.items():
            assert lines.items() <= answered[spec].items()
        counts.append(sum(map(len, found.values())))
    assert counts == sorted(counts)  # what was answered stayed
    assert len(set(counts)) > kills / 5, "the kills came too early to test anything"
    results = sweep(small_model, out, **CHANGES)
    assert journals(out) == answered and comparable(results) == comparable(reference)


def hold(out, ready):
    with locked(out):
        ready.set()
        time.sleep(60)


def test_two_runs_in_one_folder_are_refused_until_the_first_is_gone(small_model, finished):
    ready = FORK.Event()
    other = FORK.Process(target=hold, args=(finished, ready))
    other.start()
    try:
        assert ready.wait(60)
        before = (finished / "results.json").read_bytes()
        with pytest.raises(
            EvaluationError, match=rf"is in use by process {other.pid} on .*another folder with --out"
        ):
            sweep(small_model, finished)
        assert (finished / "results.json").read_bytes() == before
    finally:
        other.kill()
        other.join()
    results = sweep(small_model, finished)  # the lock of a dead process is no lock
    assert comparable(results) == comparable(json.loads(before))


FEW = {"limit": 4, "batch_size": 2, "specs": ["fastervlm@9"]}


@pytest.fixture(scope="module")
def unharmed(small_model, tmp_path_factory):
    """Results and journals of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("unharmed") / "run"
    return comparable(sweep(small_model, out, **FEW)), journals(out)


@pytest.mark.parametrize(
    ("name", "number", "error"),
    [
        ("fsync", 2, OSError(errno.EIO, "Input/output error")),
        ("fsync", 34, OSError(errno.ENOSPC, "No space left on device")),
        ("fsync", 36, KeyboardInterrupt()),
        ("replace", 4, OSError(errno.EIO, "Input/output error")),
        ("replace", 10, KeyboardInterrupt()),
    ],
    ids=str,
)
def test_a_fault_at_any_call_loses_and_doubles_nothing(
    small_model, tmp_path, monkeypatch, name, number, error
):
    changes, calls = {"limit": 4, "batch_size": 2, "specs": ["fastervlm@9"]}, []

    def fails(*args):
        calls.append(args)
        if len(calls) == number:
            raise error
        return original(*args)

    original = getattr(os, name)
    monkeypatch.setattr(os, name, fails)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else EvaluationError):
        sweep(small_model, tmp_path / "run", **FEW)
    assert len(calls) >= number
    monkeypatch.undo()
    before = journals(tmp_path / "run")
    results = sweep(small_model, tmp_path / "run", **changes)
    whole = sweep(small_model, tmp_path / "whole", **changes)
    assert comparable(results) == comparable(whole) and journals(tmp_path / "run") == journals(
        tmp_path / "whole"
    )
    assert all(lines.items() <= journals(tmp_path / "run")[spec].items() for spec, lines in before.items())
    assert not list((tmp_path / "run").rglob("*.new"))


def test_the_table_of_a_killed_run_names_what_is_not_in_it(small_model, tmp_path):
    class Stops(Silent):
        def begin(self, what, total, done):
            if what.startswith(other):
                raise KeyboardInterrupt

    other = str(shutil.copytree(small_model, tmp_path / "other"))
    given = {"models": [str(small_model), other], "limit": 4, "specs": ["fastervlm@9"]}
    with pytest.raises(KeyboardInterrupt):
        leaderboard(config(small_model, **given), tmp_path / "run", progress=Stops())
    left = Run.open(tmp_path / "run").results
    assert {row["model"] for row in left["rows"]} == {str(small_model)}
    (one,) = left["failed"]
    assert (one["model"], one["task"]) == (other, "shapes") and "the same command goes on" in one["error"]
    whole = sweep(small_model, tmp_path / "run", **given)
    assert whole["failed"] == [] and {row["model"] for row in whole["rows"]} == {str(small_model), other}
