# SPDX-License-Identifier: Apache-2.0
"""Curves: every method at every budget it can meet, points with intervals, and a picture."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmprune.core.grid import boxes
from vlmprune.errors import EvaluationError, UnsupportedError
from vlmprune.evaluation.answer.record import Record
from vlmprune.evaluation.stats.curves import Curves, Point, Verdict, curves, plan, query_aware
from vlmprune.evaluation.stats.objects import covered_share
from vlmprune.evaluation.stats.saliency import auc, saliency
from vlmprune.evaluation.tasks.registry import get_task
from vlmprune.registry import list_methods
from vlmprune.testing.tiny import tiny_bundle, tiny_model

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import curves as script

SEEDS = tuple(f"random(seed={seed})@0.125" for seed in range(3))
POINTS = [
    Point("dense", 1.0, ("dense",)),
    Point("random", 0.125, SEEDS),
    Point("pool", 0.125, ("pool@0.125",)),
    Point("fastervlm", 0.125, ("fastervlm@0.125",)),
    Point("fastv", 0.125, ("fastv@0.125",)),
]


@pytest.fixture(autouse=True)
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def records() -> list[Record]:
    """Needles are found by fastv only, text is lost by pooling, and random loses half of everything."""
    rng, found = np.random.default_rng(0), []
    for i in range(300):
        family = ("attribute", "text", "needle")[i % 3]
        right = float(rng.random() < 0.95)
        loss = dict.fromkeys(SEEDS, 0.5) | {"dense": 0, "pool@0.125": 0.9 if family == "text" else 0.1}
        loss |= {"fastervlm@0.125": 0.6 if family == "needle" else 0.05, "fastv@0.125": 0.05}
        for spec, share in loss.items():
            kept = 144 if spec == "dense" else 18
            found.append(
                Record(
                    spec=spec,
                    id=f"q{i}",
                    cluster=f"c{i}",
                    family=family,
                    group="text" if family == "text" else "general",
                    answer="x",
                    score=right * float(rng.random() >= share),
                    dense_tokens=144,
                    realised_tokens=kept,
                    layer_tokens=49.5 if spec.startswith("fastv@") else float(kept),
                    firings=3,
                    on_object=0.25,
                    positions="compact",
                    encoding="shared",
                    seconds={},
                )
            )
    return found


BLIND = {"attribute": 0.2, "text": 0.0, "needle": 0.2}


# --- the plan -------------------------------------------------------------------------------------


def test_every_registered_method_is_planned_or_left_out_for_a_reason() -> None:
    points, skipped = plan(tiny_model("llava"), (1.0, 0.5, 0.125))
    labels = {
        part for name in [*(p.label for p in points), *skipped] for part in name.split("@")[0].split("+")
    }
    assert labels == set(list_methods())
    assert points[0] == Point("dense", 1.0, ("dense",)) and all(0 < p.keep < 1 for p in points[1:])
    assert (
        {p.keep for p in points if p.label == "debias+fastv"}
        == {p.keep for p in points if p.label == "holov"}
        == {0.5, 0.125}
    )
    assert all(skipped.values()) and "pyramiddrop@0.125" in skipped and "sink" in skipped["var+fastervlm@0.5"]


def test_random_has_seeds_and_schedules_start_early_where_they_must() -> None:
    deep = tiny_model("llava", layers=8)
    points, skipped = plan(deep, (0.5, 0.25), seeds=(3, 4), methods=["random", "pyramiddrop"])
    assert [p.specs for p in points] == [
        ("dense",),
        ("random(seed=3)@0.5", "random(seed=4)@0.5"),
        ("random(seed=3)@0.25", "random(seed=4)@0.25"),
        ("pyramiddrop@0.5",),
        ("pyramiddrop(layers=(1,2,3))@0.25",),
    ]
    assert skipped == {} and points[1].name == "random@0.5"


def test_what_looks_at_the_question_is_known_through_wrappers() -> None:
    assert query_aware("debias+fastv") and query_aware("sparsevlm") and not query_aware("debias+fastervlm")


# --- the points -----------------------------------------------------------------------------------


def test_points_have_intervals_for_all_groups_and_families() -> None:
    result = curves(records(), POINTS, BLIND, resamples=500)
    points = {point.label: point for point in result.rows}
    assert list(points) == [p.label for p in POINTS] and result.headline.excluded == {}
    assert points["dense"].layer_share == 1 and points["fastv"].layer_share == 49.5 / 144
    assert points["fastv"].share == 0.125
    for point in points.values():
        found = point.accuracies
        assert (list(found.groups), list(found.families)) == (
            ["general", "text"],
            ["attribute", "text", "needle"],
        )
        value, low, high = found.all["all"]
        assert low <= value <= high and value == point.row.accuracy and point.row.on_object == 0.25
    assert points["random"].row.band.seeds == SEEDS


def test_a_result_is_read_back_from_its_json() -> None:
    result = curves(records(), POINTS, BLIND, resamples=200)
    again = json.loads(json.dumps(result.plain()))
    assert Curves.read(again, "it") == result
    row = again["rows"][1]
    assert (
        row["label"] == "random"
        and row["spec"] == "random@0.125"
        and row["accuracy"] == row["accuracies"]["all"]["all"][0]
    )
    del row["model"], row["task"]  # older files say these once, for the whole result
    assert Curves.read(again, "it") == result
    row["accuracy"] = "high"
    with pytest.raises(EvaluationError, match="it: row 2: row: accuracy is 'high'; expected a finite number"):
        Curves.read(again, "it")
    with pytest.raises(EvaluationError, match=r"it is no result of benchmarks/curves\.py"):
        Curves.read({}, "it")


def test_the_verdict_names_what_the_benchmark_is_for() -> None:
    at = curves(records(), POINTS, BLIND, resamples=500).at
    assert at.best.label == "fastv" and at.best.ci[0] > 0.2
    assert next(iter(at.pool)) == "text" and at.pool["text"].ci[1] < at.pool["attribute"].ci[0]
    assert (at.needle.query_aware, at.needle.other) == ("fastv", "fastervlm") and at.needle.ci[0] > 0
    only_dense = [p for p in POINTS if p.label == "dense"]
    assert curves(records(), only_dense, BLIND, resamples=200).at == Verdict(keep=0.125)


def test_curves_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from vlmprune.evaluation.report.curve_plot import draw_curves

    result = curves(records(), POINTS, BLIND, resamples=200)
    draw_curves(result, "tiny on shapes", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 20)) > 100
    less = []
    for point in result.rows:  # where the family is not learnt
        groups = {name: value for name, value in point.accuracies.groups.items() if name != "text"}
        less.append(replace(point, accuracies=replace(point.accuracies, groups=groups)))
    draw_curves(replace(result, rows=tuple(less)), "tiny on shapes", tmp_path / "less.png")
    assert (tmp_path / "less.png").read_bytes() != (tmp_path / "curves.png").read_bytes()


def test_plots_say_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from vlmprune.evaluation.report.curve_plot import draw_curves

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match="plots need matplotlib: pip install matplotlib"):
        draw_curves(None, "", tmp_path / "none.png")


# --- objects --------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4), min_size=2, max_size=30), st.data())
@settings(max_examples=100, deadline=None)
def test_auc_counts_pairs(scores: list[int], data: st.DataObject) -> None:
    on = np.array(data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores))))
    if on.all() or not on.any():
        return
    values = np.array(scores, dtype=float)
    pairs = [(a > b) + 0.5 * (a == b) for a in values[on] for b in values[~on]]
    assert auc(values, on) == pytest.approx(np.mean(pairs))


def test_covered_area_is_exact_also_where_boxes_cut_pixels() -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((10, 10)) < 0.5
    fine = np.kron(mask, np.ones((6, 6)))  # 60 x 60: the boxes of a 4 x 4 grid have whole pixels
    blocks = fine.reshape(4, 15, 4, 15).mean(axis=(1, 3))
    assert np.allclose(covered_share(mask, boxes(((4, 4),)), "stretch"), blocks.ravel())
    wide = np.concatenate([np.ones((10, 4), bool), mask, np.ones((10, 4), bool)], axis=1)
    assert np.allclose(covered_share(wide, boxes(((4, 4),)), "center"), blocks.ravel())
    with pytest.raises(EvaluationError, match="expected \\(height, width\\)"):
        covered_share(np.ones((3, 3, 3), bool), boxes(((1, 1),)), "stretch")


def test_saliency_knows_good_scores_from_bad_ones() -> None:
    model, processor = tiny_bundle("llava")
    samples = get_task("shapes").samples("dev", 20)
    found = saliency(model, processor, samples, lambda sample: sample.object_masks())
    assert 0 < found["ci"][0] <= found["auc"] <= found["ci"][1] < 1
    assert found["images"] <= len({image for sample in samples for image in sample.images})
    shown = next(sample for sample in samples if any(mask.any() for mask in sample.object_masks()))
    one = saliency(model, processor, [shown], lambda sample: sample.object_masks())
    assert one["images"] == 1 and one["ci"] == [0.0, 1.0]  # nothing is known of other pictures
    with pytest.raises(EvaluationError, match="none of 20 samples shows an object"):
        saliency(
            model, processor, samples, lambda sample: [np.zeros((144, 144), bool) for _ in sample.images]
        )


# --- the script -----------------------------------------------------------------------------------


def test_the_script_goes_on_from_its_journal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal, out = tmp_path / "journal.jsonl", tmp_path / "out.json"
    words = [
        "--methods",
        "random",
        "pool",
        "fastervlm",
        "--keeps",
        "1",
        "0.125",
        "--seeds",
        "2",
        "--threads",
        "1",
    ]
    words += ["--saliency", "20", "--journal", str(journal), "--out", str(out)]
    assert script.main([*words, "--limit", "10"]) == 0
    first = journal.read_text().splitlines()
    assert len(first) == 1 + 10 * 5  # what for, then 10 questions under 5 specs
    journal.write_text(
        "\n".join(first[:30]) + '\n{"spec": "dense", "id": "sha'
    )  # killed in the middle of a line
    assert script.main([*words, "--limit", "20"]) == 0
    lines = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    assert len({(line["spec"], line["id"]) for line in lines}) == 20 * 5
    again = {(line["spec"], line["id"]): line["answer"] for line in lines}
    assert all(again[line["spec"], line["id"]] == line["answer"] for line in map(json.loads, first[1:]))
    result = json.loads(out.read_text())
    assert [row["spec"] for row in result["rows"]] == [
        "dense",
        "random@0.125",
        "pool@0.125",
        "fastervlm@0.125",
    ]
    assert result["provenance"]["answers"] == 100 and "keep" not in lines[0]
    assert result["task"]["fingerprint"] == get_task("shapes").fingerprint
    assert script.main([*words, "--positions", "original", "--limit", "10"]) == 2
    assert "name another file" in capsys.readouterr().err
