# SPDX-License-Identifier: Apache-2.0
"""ScoreMap and KeepMap: validation, budgets, files, overlap, coverage and replay."""

from __future__ import annotations

import json
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from vlmprune.core.keepmap import KeepMap, Replay, ScoreMap
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import InvariantError, SpecError, VlmPruneError

GRIDS = ((2, 3), (3, 4))
SUFFIXES = (".safetensors", ".json")


def same(a, b):
    """Whether two maps of one class agree in every field, to the bit."""

    def plain(value):
        return (value.dtype, value.tolist()) if isinstance(value, torch.Tensor) else value

    return type(a) is type(b) and {k: plain(v) for k, v in vars(a).items()} == {
        k: plain(v) for k, v in vars(b).items()
    }


@st.composite
def keep_maps(draw):
    grids = tuple(draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3)))
    total = sum(rows * cols for rows, cols in grids)
    idx = sorted(draw(st.sets(st.integers(0, total - 1))))
    floats = st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=total, max_size=total
    )
    scores = draw(st.none() | floats.map(torch.tensor))
    frame = draw(st.none() | st.integers(0, 99))
    view = draw(st.sampled_from(["stretch", "center"]))
    return KeepMap(
        torch.tensor(idx, dtype=torch.int64), total, grids, scores, draw(st.text()), view, 2, frame
    )


# ---- what a map is


def test_fields_are_copied_to_cpu_tensors_of_the_promised_types():
    batch = torch.rand(2, 18, dtype=torch.float64)
    scores = ScoreMap(batch[0], [[2, 3], [3, 4]])
    batch.zero_()
    assert scores.scores.dtype == torch.float32 and scores.scores.min() > 0 and len(scores) == 18
    assert scores.grids == GRIDS
    kept = KeepMap([0, 17], 18, GRIDS)
    assert kept.keep_idx.dtype == torch.int64 and len(kept) == 2


def test_mask_share_and_boxes_name_the_kept_tokens():
    kept = KeepMap(torch.tensor([0, 5]), 6, ((2, 3),), method="random@2")
    assert kept.mask.tolist() == [True, False, False, False, False, True]
    assert kept.share == 2 / 6
    assert kept.grid == (2, 3)
    assert torch.allclose(
        kept.kept_boxes, torch.tensor([[0, 0, 1 / 3, 1 / 2], [2 / 3, 1 / 2, 1, 1]]).to(kept.boxes.dtype)
    )
    assert kept.boxes.shape == (6, 4)
    assert repr(kept) == "KeepMap('random@2', 2 of 6 tokens, 2 x 3, image 0)"


def test_total_may_be_left_to_the_grids_but_not_contradict_them():
    assert KeepMap([17], grids=GRIDS).total == 18
    for wrong in ({"total": 19, "grids": GRIDS}, {"total": 19}, {}):
        with pytest.raises(InvariantError, match="tokens; expected"):
            KeepMap([17], **wrong)


def test_a_frame_may_be_left_with_nothing():
    empty = KeepMap(torch.tensor([], dtype=torch.int64), grids=((2, 3),), frame=1)
    assert (len(empty), empty.share, empty.coverage(), empty.coverage(8)) == (0, 0, 0, 0)
    assert empty.kept_boxes.shape == (0, 4) and not empty.mask.any()
    assert empty.overlap(empty) == 1 and empty.overlap(KeepMap([0], 6, ((2, 3),))) == 0
    with pytest.raises(SpecError, match="kept no token"):
        _ = empty.replay


def test_grid_of_several_blocks_is_an_error_that_shows_them():
    with pytest.raises(SpecError, match=r"2 blocks of tokens, 2 x 3 \+ 3 x 4"):
        _ = ScoreMap(torch.rand(18), GRIDS).grid


@pytest.mark.parametrize(
    "idx, error",
    [
        ([[0, 1]], SpecError),
        ([0.0, 1.0], SpecError),
        ([True, False], SpecError),
        (["a"], SpecError),
        ([10**30], SpecError),
        ([1, 0], InvariantError),
        ([1, 1], InvariantError),
        ([-1, 2], InvariantError),
        ([0, 6], InvariantError),
    ],
)
def test_indices_must_be_ascending_distinct_and_in_range(idx, error):
    with pytest.raises(error, match="keep_idx"):
        KeepMap(idx, 6, ((2, 3),))


@pytest.mark.parametrize(
    "change, error",
    [
        ({"grids": ((2, 4),)}, InvariantError),
        ({"grids": ((0, 3), (2, 3))}, InvariantError),
        ({"grids": ((-2, -3),)}, InvariantError),
        ({"grids": (2, 3)}, SpecError),
        ({"grids": None}, SpecError),
        ({"view": "centre"}, SpecError),
        ({"method": None}, SpecError),
        ({"index": "0"}, SpecError),
        ({"frame": 1.5}, SpecError),
        ({"scores": torch.rand(5)}, InvariantError),
        ({"scores": torch.tensor([0, 1, 2, 3, 4, torch.nan])}, InvariantError),
    ],
)
def test_every_other_field_is_checked_too(change, error):
    with pytest.raises(error, match=next(iter(change))):
        KeepMap(**{"keep_idx": [0, 1], "total": 6, "grids": ((2, 3),)} | change)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e300])
def test_scores_that_are_not_finite_are_refused(bad):
    with pytest.raises(InvariantError, match="finite"):
        ScoreMap(torch.tensor([0, bad], dtype=torch.float64), ((1, 2),))


# ---- budgets


@pytest.mark.parametrize("keep", [2, 0.4, "2", "0.4"])
def test_keep_takes_the_highest_scores_and_the_lower_index_of_ties(keep):
    scores = ScoreMap(torch.tensor([1.0, 3.0, 1.0, 0.0, 1.0]), ((1, 5),), "mine", "center", 3, 7)
    kept = scores.keep(keep)
    assert kept.keep_idx.tolist() == [0, 1]
    assert (kept.total, kept.grids, kept.method, kept.view, kept.index, kept.frame) == (
        5,
        ((1, 5),),
        "mine",
        "center",
        3,
        7,
    )
    assert torch.equal(kept.scores, scores.scores)


def test_keep_takes_a_budget_object_but_no_other_scope():
    from vlmprune.spec import Budget

    scores = ScoreMap(torch.arange(4.0), ((2, 2),))
    assert scores.keep(Budget(1)).keep_idx.tolist() == [3]
    for wrong in (Budget(1, "crop"), "1/crop"):
        with pytest.raises(SpecError, match="scope"):
            scores.keep(wrong)


@pytest.mark.parametrize("keep", ["", "many", "2+random@1", 0, -1, 0.0, 1.5])
def test_a_budget_that_means_nothing_is_a_spec_error(keep):
    with pytest.raises(SpecError):
        ScoreMap(torch.arange(4.0), ((2, 2),)).keep(keep)


# ---- files


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=40, deadline=None)
@given(kept=keep_maps())
def test_a_keep_map_survives_a_file_to_the_bit(suffix, kept, tmp_path_factory):
    path = tmp_path_factory.mktemp("maps") / f"map{suffix}"
    kept.save(path)
    assert same(KeepMap.load(path), kept)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_score_map_survives_a_file_to_the_bit(suffix, tmp_path):
    scores = ScoreMap(torch.randn(18), GRIDS, "fastervlm", "center", 1, 4)
    scores.save(str(tmp_path / f"map{suffix}"))
    assert same(ScoreMap.load(str(tmp_path / f"map{suffix}")), scores)


def test_files_carry_a_format_and_a_version(tmp_path):
    kept = KeepMap([0, 2], 6, ((2, 3),))
    kept.save(tmp_path / "a.json")
    body = json.loads((tmp_path / "a.json").read_text())
    assert (body["format"], body["version"], body["keep_idx"]) == ("vlmprune.keepmap", 1, [0, 2])
    assert "scores" not in body
    kept.save(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert (
            json.loads(file.metadata()["format"]) == "vlmprune.keepmap"
            and json.loads(file.metadata()["version"]) == 1
        )
        assert list(file.keys()) == ["keep_idx"]


@pytest.mark.parametrize("name", ["map.pt", "map.pkl", "map", "map.jsn"])
def test_another_suffix_names_the_two_that_work(name, tmp_path):
    kept = KeepMap([0], 6, ((2, 3),))
    for call in (kept.save, KeepMap.load):
        with pytest.raises(SpecError, match=r"\.safetensors or \.json"):
            call(tmp_path / name)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b"null",
        b"[" * 100_000,
        b'{"format": "vlmprune.keepmap", "version": 2, "keep_idx": [0], "total": 1, "grids": [[1, 1]]}',
        b'{"format": "vlmprune.scoremap", "version": 1, "scores": [1.0], "grids": [[1, 1]]}',
        b'{"format": "vlmprune.keepmap", "version": 1, "keep_idx": [0], "total": 1}',
        b'{"format": "vlmprune.keepmap", "version": 1, "keep_idx": [0], "total": 1, "grids": [[1, 1]], '
        b'"extra": 1}',
        b'{"format": "vlmprune.keepmap", "version": 1, "keep_idx": [1], "total": 1, "grids": [[1, 1]]}',
        b'{"format": "vlmprune.keepmap", "version": 1, "keep_idx": {"a": 1}, "total": 1, "grids": [[1, 1]]}',
        b'{"format": "vlmprune.keepmap", "version": 1, "keep_idx": [1e400], "total": 1, "grids": [[1, 1]]}',
    ],
)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_damaged_or_foreign_file_is_refused_by_name(content, suffix, tmp_path):
    path = tmp_path / f"map{suffix}"
    path.write_bytes(content)
    with pytest.raises(VlmPruneError, match=f"map{suffix}' is not a whole KeepMap file"):
        KeepMap.load(path)


def test_a_truncated_or_foreign_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "map.safetensors"
    KeepMap(range(50), 60, ((6, 10),), torch.rand(60)).save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(VlmPruneError, match="not a whole KeepMap"):
        KeepMap.load(path)
    for metadata in (None, {"format": "pt"}):
        save_file({"weight": torch.rand(3)}, path, metadata=metadata)
        with pytest.raises(VlmPruneError, match="not a whole KeepMap"):
            KeepMap.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"no file at .*gone\.json"):
        KeepMap.load(tmp_path / "gone.json")


# ---- comparing


def test_overlap_is_the_jaccard_index():
    a, b = KeepMap([0, 1, 2], 6, ((2, 3),)), KeepMap([2, 3], 6, ((2, 3),))
    assert a.overlap(b) == b.overlap(a) == 1 / 4
    assert a.overlap(a) == 1
    assert a.overlap(KeepMap([4], 6, ((2, 3),))) == 0
    with pytest.raises(SpecError, match="6 and 8"):
        a.overlap(KeepMap([0], 8, ((2, 4),)))


def test_coverage_of_one_block_is_its_share():
    assert KeepMap([0, 3], 6, ((2, 3),)).coverage() == 2 / 6


def test_coverage_of_two_blocks_counts_common_area_once():
    whole, corner = 0, 1  # a 1 x 1 base and a 2 x 2 detail block
    assert KeepMap([whole, corner], 5, ((1, 1), (2, 2))).coverage() == 1
    assert KeepMap([corner, 2], 5, ((1, 1), (2, 2))).coverage() == 0.5
    # left half by one block, top third by the other
    assert KeepMap([0, 2], 5, ((1, 2), (3, 1))).coverage() == pytest.approx(1 / 2 + 1 / 3 - 1 / 6, abs=1e-15)


@settings(max_examples=40, deadline=None)
@given(kept=keep_maps())
def test_coverage_equals_a_literal_count_on_fractions(kept):
    corners, start = [], 0
    for rows, cols in kept.grids:
        tokens = [i for i in range(rows * cols) if kept.mask[start + i]]
        corners += [
            (Fraction(i // cols, rows), Fraction(i % cols, cols), Fraction(1, rows), Fraction(1, cols))
            for i in tokens
        ]
        start += rows * cols
    edges = sorted({Fraction(i, side) for grid in kept.grids for side in grid for i in range(side + 1)})
    spans = [(low, high - low) for low, high in pairwise(edges)]
    area = sum(
        height * width
        for y, height in spans
        for x, width in spans
        if any(top <= y < top + tall and left <= x < left + wide for top, left, tall, wide in corners)
    )
    assert kept.coverage() == float(area)
    assert 0 <= kept.coverage() <= 1


def test_coverage_in_cells_tells_spread_from_clumped():
    side = 16
    spread = [row * side + col for row in range(0, side, 2) for col in range(0, side, 2)]
    assert KeepMap(spread, 256, ((16, 16),)).coverage(cells=8) == 1
    assert KeepMap(range(64), 256, ((16, 16),)).coverage(cells=8) == 2 * 8 / 64
    assert KeepMap([0], 256, ((16, 16),)).coverage(cells=8) == 1 / 64


@settings(max_examples=30, deadline=None)
@given(kept=keep_maps(), cells=st.integers(1, 9))
def test_keeping_all_covers_every_cell_that_can_be_covered(kept, cells):
    assert KeepMap(range(kept.total), kept.total, kept.grids).coverage(cells) == 1
    assert 0 <= kept.coverage(cells) <= 1


def test_cells_must_be_positive():
    with pytest.raises(SpecError, match="cells=0"):
        KeepMap([0], 6, ((2, 3),)).coverage(0)


# ---- replay


def test_replay_keeps_exactly_the_same_tokens_in_every_row():
    kept = KeepMap([1, 4], 6, ((2, 3),))
    method = kept.replay
    assert isinstance(method, Replay) and method.keep == 2 and method.kind() == "select"
    assert method.select(VisualTokens(features=torch.rand(3, 6, 2)), 2).tolist() == [[1, 4]] * 3
    assert method == kept.replay and hash(method) == hash(kept.replay)


@pytest.mark.parametrize("count, k", [(7, 2), (6, 1), (6, 3)])
def test_replay_refuses_another_size_or_budget(count, k):
    method = KeepMap([1, 4], 6, ((2, 3),)).replay
    with pytest.raises(InvariantError, match=f"keep {k} of {count} tokens; this replay holds 2 of 6"):
        method.select(VisualTokens(features=torch.rand(1, count, 2)), k)


# ---- hostile sizes: refused before memory is asked for

HUGE = [((10**9, 10**9),), ((1, 2**20 + 1),), ((1, 1),) * (2**16 + 1), ((10**6, 10**6), (1, 1))]


@pytest.mark.parametrize("grids", HUGE, ids=["square", "line", "blocks", "two"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_grids_of_more_tokens_than_an_image_has_are_refused(tmp_path, grids, suffix):
    with pytest.raises(
        InvariantError, match=r"hold .* tokens or more; expected at most 1,048,576 tokens in 65,536 blocks"
    ):
        KeepMap([0, 1], grids=grids)
    path = tmp_path / f"map{suffix}"
    KeepMap([0], grids=((2, 3),)).save(path)
    if suffix == ".json":
        body = json.loads(path.read_text()) | {"grids": grids, "total": 0}
        path.write_text(json.dumps(body))
    else:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() | {"grids": json.dumps(grids), "total": "0"}
            save_file({"keep_idx": file.get_tensor("keep_idx")}, path, metadata=metadata)
    with pytest.raises(SpecError, match="is not a whole KeepMap file") as error:
        KeepMap.load(path)
    assert len(str(error.value)) < 500


def test_a_message_about_grids_stays_short():
    for grids in (["many"] * 10_000, ((1, 1),) * 10_000):
        with pytest.raises(VlmPruneError) as error:
            KeepMap([0], total=7, grids=grids)
        assert len(str(error.value)) < 500


def test_an_exact_area_of_hostile_blocks_is_refused(monkeypatch):
    monkeypatch.setattr("vlmprune.core.grid.CELLS", 2000)
    kept = KeepMap([0], grids=((50, 1), (1, 41)))
    with pytest.raises(SpecError, match="give cells=8"):  # 50 x 41 cells
        kept.coverage()
    assert 0 < kept.coverage(cells=8) < 1
    assert 0 < KeepMap([0], grids=((50, 1), (1, 40))).coverage() < 1


# ---- the picture that a map remembers


def test_a_score_map_hands_its_picture_on_and_files_hold_none(tmp_path):
    scores = ScoreMap(torch.rand(6), ((2, 3),), image="photo.jpg")
    assert scores.keep(2).image == "photo.jpg"
    scores.save(tmp_path / "map.json")
    assert (
        "photo" not in (tmp_path / "map.json").read_text()
        and ScoreMap.load(tmp_path / "map.json").image is None
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_cannot_name_a_picture_to_open(tmp_path, suffix):
    path = tmp_path / f"map{suffix}"
    ScoreMap(torch.rand(6), ((2, 3),)).save(path)
    if suffix == ".json":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"image": "/etc/passwd"}))
    else:
        with safe_open(path, framework="pt") as file:
            save_file(
                {"scores": file.get_tensor("scores")}, path, metadata=file.metadata() | {"image": '"x.png"'}
            )
    with pytest.raises(SpecError, match="names a picture"):
        ScoreMap.load(path)


# ---- how maps show themselves


@pytest.mark.parametrize(
    ("grids", "said"),
    [
        (((2, 3),), "2 x 3"),
        (((2, 3),) * 5, "5 times 2 x 3"),
        (((2, 3), (3, 4)), "2 x 3 + 3 x 4"),
        (((1, 1), (1, 2), (1, 3), (1, 4), (1, 5)), "1 x 1 + 1 x 2 + 1 x 3 + 1 x 4 + 1 more"),
    ],
)
def test_a_map_is_one_short_line(grids, said):
    count = sum(rows * cols for rows, cols in grids)
    scores = ScoreMap(torch.arange(count) / 4, grids, "fastervlm", index=2, frame=7)
    highest = (count - 1) / 4
    assert (
        repr(scores)
        == f"ScoreMap('fastervlm', {count} tokens, scores 0 to {highest:.3g}, {said}, image 2, frame 7)"
    )


def test_a_map_says_what_was_merged_and_into_what():
    kept = KeepMap([1, 4], 6, ((2, 3),), joins=[1, 1, -1, 4, 4, 1])
    assert kept.merged.tolist() == [True, False, False, True, False, True]
    assert kept.members(1).tolist() == [0, 1, 5] and kept.members(4).tolist() == [3, 4]
    assert KeepMap([1, 4], 6, ((2, 3),)).merged is None


def test_what_is_not_known_or_does_not_fit_is_refused():
    with pytest.raises(SpecError, match="does not say what its rows are made of"):
        KeepMap([1], 6, ((2, 3),)).members(1)
    with pytest.raises(InvariantError, match="joins hold 2 tokens; expected one entry for each of 6"):
        KeepMap([1], 6, ((2, 3),), joins=[1, 1])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_was_merged_survives_a_file(suffix, tmp_path):
    path = tmp_path / f"map{suffix}"
    KeepMap([1, 4], 6, ((2, 3),), joins=[1, 1, -1, 4, 4, 1]).save(path)
    assert KeepMap.load(path).joins.tolist() == [1, 1, -1, 4, 4, 1]
