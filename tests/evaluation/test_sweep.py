# SPDX-License-Identifier: Apache-2.0
"""Sweeps: what is compared, what a cell is, what is answered only once, and which errors are raised."""

from __future__ import annotations

import errno
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sweep_tools import BATCH, QUESTIONS, ROWS, SPECS, comparable, config, journals, sweep

import vlmprune
from vlmprune.errors import EvaluationError, SpecError
from vlmprune.evaluation.leaderboard import identity, journal, work
from vlmprune.evaluation.leaderboard.plan import default_config, shards, shrinks, with_baselines
from vlmprune.evaluation.leaderboard.run import Settings, planned
from vlmprune.evaluation.leaderboard.rundir import Run, cell_id
from vlmprune.evaluation.report.check import check
from vlmprune.evaluation.tasks import registry as tasks
from vlmprune.registry import unregister
from vlmprune.testing.tiny import tiny_bundle


@pytest.fixture
def watched(monkeypatch):
    """Which specs answered which samples, call by call."""
    calls = []

    def evaluate(model, processor, samples, specs, task, **options):
        calls.append((tuple(specs), tuple(sample.id for sample in samples)))
        return original(model, processor, samples, specs, task, **options)

    original = work.evaluate
    monkeypatch.setattr(work, "evaluate", evaluate)
    return calls


# --- what is compared -----------------------------------------------------------------------------


def test_baselines_join_at_every_budget():
    found = with_baselines(["fastervlm@9", "fastv(layer=2)@0.25", "var+holov@9/crop"], (0, 1, 2))
    for budget in ("9", "0.25", "9/crop"):
        assert {f"random(seed={seed})@{budget}" for seed in (0, 1, 2)} | {
            f"uniform@{budget}",
            f"pool@{budget}",
        } <= set(found)
    assert found[:2] == ["dense", "blind"] and len(set(found)) == len(found) == 2 + 3 * 5 + 3
    shrinking = with_baselines(["fastervlm@9", "fastv@0.25", "var+holov@9/crop"], (0, 1, 2), shrinks=True)
    # a picture is shrunk as a whole
    assert [text for text in shrinking if "downsample" in text] == ["downsample@9", "downsample@0.25"]


def test_smaller_pictures_are_compared_with_where_a_family_reads_them(tmp_path):
    still = SimpleNamespace(video=False)
    found = {}
    for family in ("llava", "qwen2_vl"):
        folder = tmp_path / family
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": family}))
        found[family] = shrinks(str(folder), still, False)
    assert found == {"llava": False, "qwen2_vl": True} and not shrinks("tiny", still, False)
    assert not shrinks(str(tmp_path / "qwen2_vl"), SimpleNamespace(video=True), False)


def test_a_random_without_a_seed_is_the_band():
    assert with_baselines(["random@9", "dense", "pool@9"], (3, 4, 5)) == [
        "dense",
        "blind",
        "random(seed=3)@9",
        "random(seed=4)@9",
        "random(seed=5)@9",
        "uniform@9",
        "pool@9",
    ]


def test_the_default_is_six_methods_at_three_budgets_on_a_thousand_questions():
    default, quick = default_config(), default_config(quick=True)
    assert len(default.specs) == 18 and len({part.name for spec in default.specs for part in spec.parts}) == 6
    assert default.limit == 1000 and quick.limit < 1000 and len(quick.specs) == 6


@given(st.lists(st.integers(0, 6), max_size=40), st.integers(1, 9))
def test_shards_hold_every_sample_once_and_whole_clusters(clusters, size):
    samples = [SimpleNamespace(id=i, cluster=cluster) for i, cluster in enumerate(clusters)]
    found = shards(samples, size)
    assert sorted(sample.id for shard in found for sample in shard) == list(range(len(samples)))
    for cluster in set(clusters):
        assert sum(any(sample.cluster == cluster for sample in shard) for shard in found) == 1
    assert all(len(shard) <= size or len({sample.cluster for sample in shard}) == 1 for shard in found)


# --- rows and cells -------------------------------------------------------------------------------


def test_every_row_is_there_and_passes_validation(small_model, finished):
    results = json.loads((finished / "results.json").read_text())
    assert [row["spec"] for row in results["rows"]] == ROWS
    for row in results["rows"]:
        assert (row["model"], row["task"], row["n"]) == (str(small_model), "shapes", QUESTIONS)
        assert 0 <= row["accuracy"] <= 1 and len(row["families"]) == 10
        share = {"dense": 1, "blind": 0}.get(row["spec"], 9 / 36)
        assert row["realised_tokens"] / row["dense_tokens"] == share
    band = results["rows"][-1]["band"]
    assert band["seeds"] == ROWS[2:5] and band["low"] <= results["rows"][-1]["accuracy"] <= band["high"]
    check(Run.open(finished))  # the report takes it
    assert all(len(lines) == QUESTIONS for lines in journals(finished).values())


def test_kept_patches_are_journalled_for_drawing(finished):
    found = journals(finished)
    assert all("keep" not in line for line in found["dense"].values())
    assert all(len(one["keep_idx"]) == 9 for line in found["fastervlm@9"].values() for one in line["keep"])


def test_a_second_run_answers_nothing_and_says_the_same(small_model, finished, watched):
    before = {path: path.read_bytes() for path in (finished / "cells").iterdir()}
    first = json.loads((finished / "results.json").read_text())
    assert comparable(sweep(small_model, finished)) == comparable(first)
    assert watched == [] and {path: path.read_bytes() for path in (finished / "cells").iterdir()} == before


def test_only_what_is_missing_is_answered(small_model, finished, watched):
    whole = journals(finished)
    recipes = (finished / "cells").glob("*.json")
    path = next(path for path in recipes if json.loads(path.read_text())["spec"] == "pool@9").with_suffix(
        ".jsonl"
    )
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3] + lines[4:]) + lines[3][:20])  # one is gone, and another is torn
    sweep(small_model, finished)
    assert journals(finished) == whole
    ((specs, ids),) = watched
    assert specs == ("pool@9",) and json.loads(lines[3])["id"] in ids and len(ids) <= BATCH


def test_more_specs_join_a_run_and_answer_alone(small_model, finished, watched):
    rows = sweep(small_model, finished, specs=[*SPECS, "holov@9"])["rows"]
    assert [row["spec"] for row in rows] == [*ROWS[:-1], "holov@9", "random@9"]
    assert {specs for specs, _ in watched} == {("holov@9",)}


def test_the_tower_sees_every_image_of_a_portion_once(small_model, tmp_path):
    work.bench.cache_clear()
    seen = []
    model, _ = work.load_model(str(small_model), "cpu", "auto", False)
    watch = model.model.vision_tower.register_forward_hook(
        lambda module, args, output: seen.append(len(output[0]))
    )
    sweep(small_model, tmp_path / "run")
    watch.remove()
    images = {key for sample in tasks.get_task("shapes").samples("test", QUESTIONS) for key in sample.images}
    assert sum(seen) == len(images)


CHANGES = [
    {"batch_size": 4},
    {"max_new_tokens": 3},
    {"limit": 10},
    {"split": "dev"},
    {"dtype": "bfloat16"},
    {"positions": "original"},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_what_can_change_an_answer_makes_another_cell(small_model, change):
    old, same, new = (
        planned(config(small_model, **changes), Settings()) for changes in ({}, {"seeds": [4, 5, 6]}, change)
    )
    assert cell_id(identity.recipe(old[0], "pool@9")) == cell_id(identity.recipe(same[0], "pool@9"))
    assert cell_id(identity.recipe(old[0], "pool@9")) != cell_id(identity.recipe(new[0], "pool@9"))


def test_the_device_and_the_code_make_another_cell(small_model):
    (one,) = planned(config(small_model), Settings())
    for other in (replace(one, device="cuda"), replace(one, versions=(*one.versions[:-1], ("code", "0")))):
        assert cell_id(identity.recipe(other, "pool@9")) != cell_id(identity.recipe(one, "pool@9"))
    assert identity.recipe(replace(one, device="cuda:1"), "pool@9") == identity.recipe(
        replace(one, device="cuda:0"), "pool@9"
    )


def test_other_weights_are_another_cell(small_model, finished, tmp_path):
    copy = tmp_path / "copy"
    model, processor = tiny_bundle("llava", seed=1)
    model.save_pretrained(copy), processor.save_pretrained(copy)
    assert (
        identity.weights(str(copy))
        != identity.weights(str(small_model))
        == identity.weights(str(small_model))
    )


# --- what goes wrong ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Broken(vlmprune.Method):
    """Gives scores that are no numbers from the second batch on."""

    needs = ("features",)
    calls: ClassVar[list[int]] = []

    def score(self, tokens: Any) -> Any:
        self.calls.append(1)
        scores = tokens.features.norm(dim=-1)
        return scores if len(self.calls) < 2 else scores * float("nan")


def test_a_spec_that_fails_has_no_row_and_the_others_go_on(small_model, tmp_path, finished):
    vlmprune.register("broken")(Broken)
    try:
        Broken.calls.clear()
        results = sweep(small_model, tmp_path / "run", specs=["broken@9", *SPECS, "fastervlm(layer=99)@9"])
    finally:
        unregister("broken")
    assert [row["spec"] for row in results["rows"]] == ROWS
    errors = {one["spec"]: one["error"] for one in results["failed"]}
    assert set(errors) == {"broken@9", "fastervlm(layer=99)@9"} and "broken@9" in errors["broken@9"]
    mine = {spec: lines for spec, lines in journals(tmp_path / "run").items() if spec in ROWS}
    assert mine == journals(finished)  # the failure changed no other answer


def test_a_picture_that_cannot_be_so_small_costs_one_row(tmp_path):
    model, processor = tiny_bundle("llava_next")
    model.save_pretrained(tmp_path / "tiles"), processor.save_pretrained(tmp_path / "tiles")
    # which sizes tiles can have is known picture by picture, so this is found while questions are answered
    given = {"specs": ["downsample@3", "divprune@3"], "limit": 6}
    results = sweep(tmp_path / "tiles", tmp_path / "run", **given)
    others = [spec.replace("@9", "@3") for spec in (*ROWS[:7], "divprune@9", "random@9")]
    assert [row["spec"] for row in results["rows"]] == others
    assert [one["spec"] for one in results["failed"]] == ["downsample@3"]
    assert "72 at least, in tiles of one size" in results["failed"][0]["error"]


def test_a_full_disk_is_told_and_nothing_is_lost(small_model, tmp_path, finished, monkeypatch):
    calls = []

    def full(file, data):
        calls.append(len(data))
        if len(calls) == 25:
            file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(file, data)

    original = journal._write
    monkeypatch.setattr(journal, "_write", full)
    with pytest.raises(EvaluationError, match=r"disk is full; make room and run the same command again"):
        sweep(small_model, tmp_path / "run")
    files = list((tmp_path / "run" / "cells").glob("*.jsonl"))
    assert sum(path.stat().st_size for path in files) and all(
        path.read_bytes()[-1:] in (b"\n", b"") for path in files
    )
    monkeypatch.undo()
    sweep(small_model, tmp_path / "run")
    assert journals(tmp_path / "run") == journals(finished)


def test_a_run_of_another_format_is_refused_by_name(small_model, finished):
    path = finished / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99, "version": "7.0"}))
    with pytest.raises(
        EvaluationError, match=r"format 99, written by vlmprune 7\.0; this version writes format 2"
    ):
        sweep(small_model, finished)


def test_a_folder_of_other_things_is_refused(small_model, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(EvaluationError, match="is not empty and holds no run"):
        sweep(small_model, tmp_path)
    with pytest.raises(EvaluationError, match="is a file"):
        sweep(small_model, tmp_path / "thesis.tex")


class Absent:
    """A task whose data is not there."""

    name, fingerprint, families, groups, blind = "absent", "0", (), {}, {}

    def samples(self, split: str = "test", limit: int | None = None) -> Any:
        raise ConnectionError("Couldn't reach the hub: offline mode is on")


def test_data_that_is_missing_offline_is_told_with_the_way_to_it(small_model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "absent_task", SimpleNamespace(make=Absent))
    monkeypatch.setitem(tasks._BUILTIN, "absent", "absent_task:make")
    with pytest.raises(
        EvaluationError, match=r"'absent'.*offline mode is on; fetch its data once on a machine with network"
    ):
        sweep(small_model, tmp_path / "run", tasks=["absent"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tasks": ["shpaes"]}, SpecError, "task 'shpaes' is unknown.*Did you mean 'shapes'"),
        ({"specs": ["fasterlvm@9"]}, SpecError, "Did you mean 'fastervlm'"),
        ({"limit": 10**6}, SpecError, "limit=1000000"),
        ({"split": "tset"}, SpecError, "Did you mean 'test'"),
        ({"seeds": [0]}, SpecError, "expected at least 3"),
        ({"models": ["./nowhere"]}, vlmprune.errors.VlmPruneError, "'./nowhere' does not exist"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_input_is_named_before_anything_is_written(small_model, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        sweep(small_model, tmp_path / "run", **change)
    assert not list(tmp_path.glob("run/cells/*"))


def test_a_config_file_gives_the_run(small_model, tmp_path):
    assert config(small_model, specs=["fastervlm"], keep=[9, 0.5]).plain()["specs"] == [
        "fastervlm@9",
        "fastervlm@0.5",
    ]
    assert Path(config(small_model).plain()["models"][0]) == small_model
