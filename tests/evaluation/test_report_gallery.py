# SPDX-License-Identifier: Apache-2.0
"""The gallery of flips: every method has its share, pictures stand beside what was kept of them."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from simulated_run import simulate

from vlmprune.errors import EvaluationError
from vlmprune.evaluation.leaderboard.rundir import Run, decode_lines, encode_line
from vlmprune.evaluation.report import write_report
from vlmprune.evaluation.report.gallery import Answer, Kept, _pictures, draw_kept, gallery
from vlmprune.evaluation.report.judge import ordered, series
from vlmprune.evaluation.report.load import Results


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return simulate(tmp_path_factory.mktemp("gallery") / "run", samples=60, budgets=(36, 9), resamples=100)


def made(folder, limit=32):
    run = Run.open(folder)
    return gallery(run, ordered(Results.of(run).rows), limit)


def test_every_method_shows_as_many_and_as_many_won_as_lost(run):
    found = made(run)
    assert len(found.flips) == 32 < found.total
    by_method = Counter(series(flip.row.spec) for flip in found.flips)
    assert set(by_method.values()) == {4} and len(by_method) == 8  # random by its first seed
    sides = Counter((series(flip.row.spec), flip.won) for flip in found.flips)
    wins = Counter((series(flip.row.spec), flip.won) for flip in made(run, limit=1000).flips)
    assert all(sides[method, True] == min(2, wins[method, True]) for method in by_method)
    assert sum(sides[method, True] == 2 for method in by_method) > 4
    assert {flip.row.keep for flip in found.flips} == {"36", "9"}  # budgets take turns as well
    random = {flip.row.spec for flip in found.flips if flip.row.method == "random"}
    assert random == {"random(seed=0)@36", "random(seed=0)@9"}


def test_a_method_that_wins_nothing_shows_what_it_lost(tmp_path, run):
    def never_won(lines):
        for line in lines:
            line["score"] = 0.0 if line["spec"].startswith("holov") else line["score"]

    found = made(edited(run, tmp_path, never_won))
    mine = [flip for flip in found.flips if flip.row.method == "holov"]
    assert len(mine) == 4 and not any(flip.won for flip in mine)


def test_methods_that_changed_nothing_are_named(tmp_path, run):
    dense = {}

    def as_dense(lines):
        for line in lines:
            dense.setdefault(line["id"], line["score"] if line["spec"] == "dense" else None)
            line["score"] = 1.0 if line["spec"].startswith(("dense", "uniform")) else line["score"]

    found = made(edited(run, tmp_path, as_dense))
    assert "No answer changed under uniform." in found.notes
    assert not any(flip.row.method == "uniform" for flip in found.flips)


def test_recorded_patches_come_first_and_questions_without_them_show_the_picture(run):
    found = made(run, limit=500)
    for method in {series(flip.row.spec) for flip in found.flips}:
        mine = [flip for flip in found.flips if series(flip.row.spec) == method]
        assert any(flip.answer.keep for flip in mine) and any(not flip.answer.keep for flip in mine)
    first = made(run, limit=16).flips
    assert all(flip.answer.keep for flip in first)
    for flip in found.flips:
        assert flip.pictures and flip.question and flip.expected
        assert all(bool(shown.after) == bool(flip.answer.keep) for shown in flip.pictures)


def test_the_page_says_what_is_merged_and_what_was_not_recorded(tmp_path, run):
    def hardly_recorded(lines):
        for line in lines[1:]:
            line.pop("keep", None)

    page = write_report(edited(run, tmp_path, hardly_recorded)).read_text()
    cards = page.split("<article")[1:]
    for card in cards:
        merging = 'data-spec="pool@' in card.partition(">")[0]
        assert ("others merged into them" in card) == merging
        assert "of the kept ones lie on what is asked about" in card
        assert ("which ones was not recorded" in card) == ("kept patches outlined" not in card)
    assert any("not recorded" in card for card in cards) and any('data-spec="pool@' in card for card in cards)


def decoded(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")


def answer(**changes):
    values = {
        "id": "sample",
        "family": "f",
        "answer": "",
        "score": 1.0,
        "realised_tokens": 1,
        "dense_tokens": 4,
    }
    return Answer(**values | changes)


def test_tiles_stand_side_by_side_and_what_no_token_covers_is_striped():
    image = Image.new("RGB", (60, 40), (200, 30, 30))  # wider than the model's view
    kept = Kept((0, 9), ((2, 2), (2, 4)), "center")
    (shown,) = _pictures([image], answer(keep=(kept,)), merges=False)
    before, drawn = decoded(shown.before), decoded(shown.after)
    scale = before.height // 40
    assert before.size == (60 * scale, 40 * scale) and before.height >= 288
    assert drawn.height == before.height and drawn.width > 2 * 60 * scale  # two panels and a gap
    red, green, _ = drawn.getpixel((12 * scale, 2 * scale))  # inside the first kept patch
    assert red > 150 and green < 80
    beside = np.asarray(drawn)[:, : 5 * scale].astype(
        int
    )  # left of the centred square: no picture, two greys
    assert (abs(beside[..., 0] - beside[..., 1]) < 25).mean() > 0.9 and beside[..., 0].std() > 5


def test_a_thin_picture_is_not_enlarged_beyond_what_can_be_written():
    (shown,) = _pictures([Image.new("RGB", (3000, 6))], answer(), merges=False)
    assert decoded(shown.before).size == (3000, 6)
    (shown,) = _pictures([Image.new("RGB", (400, 6))], answer(), merges=False)
    assert decoded(shown.before).size == (4000, 60)  # and not 48 times as large


def test_merged_patches_are_pale_and_dropped_ones_are_grey():
    image = Image.new("RGB", (80, 80), (200, 30, 30))
    kept = Kept((0,), ((2, 2),), "stretch")
    dropped, merged = (draw_kept(image, kept, "s", merges).getpixel((70, 70)) for merges in (False, True))
    assert max(dropped) - min(dropped) < 40 and max(dropped) < 100
    red, green, blue = merged
    assert red > 200 and red - green > 50 and min(green, blue) > 100  # still red, and paler
    assert draw_kept(image, kept, "s", True).getpixel((20, 20)) == (200, 30, 30)


@pytest.mark.parametrize(
    "kept",
    [
        Kept((4,), ((2, 2),), "stretch"),
        Kept((-1,), ((2, 2),), "stretch"),
        Kept((0,), ((10**6, 10**6),), "stretch"),
        Kept((), ((0, 0),), "stretch"),
    ],
)
def test_patches_outside_their_grids_are_refused_before_they_are_drawn(kept):
    with pytest.raises(EvaluationError, match="sample: its journal has kept patches outside grids"):
        draw_kept(Image.new("RGB", (8, 8)), kept, "sample", False)


def test_kept_patches_of_another_number_of_pictures_are_refused():
    kept = Kept((0,), ((1, 1),), "stretch")
    with pytest.raises(EvaluationError, match="shows 1 images, its journal has kept patches of 2"):
        list(_pictures([Image.new("RGB", (8, 8))], answer(keep=(kept, kept)), False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line: line.update(score="right"), "has the score 'right'; run its row again"),
        (lambda line: line.update(keep=[{"grids": [[1, 1]]}]), r"keep\[0\] lacks \['keep_idx', 'view'\]"),
        (lambda line: line.update(realised_tokens=None), "realised_tokens is None; expected a whole number"),
    ],
)
def test_a_journal_that_cannot_be_drawn_says_where(tmp_path, run, change, message):
    def broken(lines):
        for line in lines:
            if line["spec"] == "uniform@36":
                change(line)

    with pytest.raises(EvaluationError, match=message):
        made(edited(run, tmp_path, broken), limit=500)


def test_questions_that_changed_since_are_not_drawn(run, monkeypatch):
    from vlmprune.evaluation.tasks.shapes import ShapesTask

    monkeypatch.setattr(ShapesTask, "fingerprint", "another")
    found = made(run)
    assert found.notes == ["Pictures of shapes are left out: its questions are not those of the run any more"]
    assert len(found.flips) == 32 and not any(flip.pictures for flip in found.flips)
    page = write_report(run).read_text()
    assert "its questions are not those of the run any more" in page and "data:image/jpeg" not in page


def edited(folder, tmp_path, change):
    """A copy whose journals were changed line by line."""
    copy = tmp_path / "copy"
    (copy / "cells").mkdir(parents=True)
    for path in [*folder.glob("*.json"), *folder.glob("cells/*.json")]:
        (copy / path.relative_to(folder)).write_bytes(path.read_bytes())
    for path in folder.glob("cells/*.jsonl"):
        lines, _ = decode_lines(path.stem, path.read_bytes())
        spec = json.loads(path.with_suffix(".json").read_text())["spec"]
        lines = [{"spec": spec} | line for line in lines]
        change(lines)
        (copy / "cells" / path.name).write_bytes(b"".join(encode_line(path.stem, line) for line in lines))
    return copy


def test_a_journal_that_says_what_was_merged_is_drawn_so():
    grey = Image.new("RGB", (60, 20), (200, 60, 60))
    drawn = np.asarray(draw_kept(grey, Kept((0,), ((1, 3),), "stretch", merged=(1,)), "q", merges=True))
    merged, dropped = drawn[10, 30].astype(int), drawn[10, 50].astype(int)
    assert merged[0] > 200 and dropped.sum() < 320 * 0.5
    pale = np.asarray(draw_kept(grey, Kept((0,), ((1, 3),), "stretch"), "q", merges=True))
    assert (pale[10, 50] == drawn[10, 30]).all()
    with pytest.raises(EvaluationError, match="patches outside grids"):
        draw_kept(grey, Kept((0,), ((1, 3),), "stretch", merged=(3,)), "q", merges=True)
