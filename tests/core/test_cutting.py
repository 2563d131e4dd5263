# SPDX-License-Identifier: Apache-2.0
"""Rows to pictures, pictures to units, choices to slots: by lists written out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from vlmprune.core.method import Merged, Method, needs_of
from vlmprune.core.report import Report
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import InvariantError, UnsupportedError
from vlmprune.hooks.sequence.placement import assign
from vlmprune.hooks.slots.before_lm import all_hosts, cut_pictures, hosts_of
from vlmprune.hooks.slots.cutting import Cut
from vlmprune.hooks.vision.pictures import Picture, make_units
from vlmprune.spec import Budget

Grids = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class First(Method):
    """Scores tokens by their first feature."""

    name: ClassVar[str] = "first"
    needs: ClassVar[tuple[str, ...]] = ("features",)

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.need("features")[..., 0]


@dataclass(frozen=True)
class Reversed(Method):
    """Rows of its own, at the slots of the last k tokens, last token first; the first row has no place."""

    name: ClassVar[str] = "reversed"

    def merge(self, tokens: VisualTokens, k: int) -> Merged:
        slots = torch.arange(tokens.count - 1, tokens.count - 1 - k, -1).repeat(tokens.batch, 1)
        slots[:, 0] = -1
        rows = torch.arange(k, dtype=torch.float)[None, :, None].repeat(tokens.batch, 1, 2)
        return Merged(rows, slots)


def image(
    scores: Sequence[float], special: Sequence[int] = (), grids: Grids = (), frames: bool = False
) -> Picture:
    """A picture whose features hold ``scores``, with slots ``special`` that are no patches and one crop per
    block.
    """
    grids = grids or ((1, len(scores)),)
    length = len(scores) + len(special)
    marks = torch.tensor([slot in special for slot in range(length)])
    crops = torch.cat([torch.full((rows * cols,), number) for number, (rows, cols) in enumerate(grids)])
    features = torch.zeros(length, 2)
    features[~marks, 0] = torch.tensor(scores, dtype=torch.float)
    return Picture(features, grids, {}, marks if special else None, lambda: crops, frames=frames)


def cut(
    pictures: list[Picture],
    samples: list[list[int]],
    keep: int | float,
    scope: str = "image",
    method: Method | None = None,
    **options: bool,
) -> list[Cut | None]:
    method = method or First()
    budget, needs = Budget(keep, scope), needs_of(method)
    return cut_pictures(pictures, samples, method, budget, lambda x: x, needs=needs, **options)


def kept(cuts: list[Cut | None]) -> list[list[int] | None]:
    return [None if one is None else one.keep_idx.tolist() for one in cuts]


def test_rows_get_their_pictures_in_reading_order() -> None:
    assert assign([3, 5, 3], [3, 0, 8]) == [[0], [], [1, 2]]
    assert assign([4], [4]) == [[0]]


def test_expanded_rows_share_the_pictures_of_their_prompt() -> None:
    assert assign([3, 5, 4], [3, 3, 0, 0, 9, 9]) == [[0], [0], [], [], [1, 2], [1, 2]]


@pytest.mark.parametrize(
    ("lengths", "counts"), [([3], [4]), ([3, 3], [2, 4]), ([3, 5], [3, 5, 5, 3]), ([], [2]), ([4], [0])]
)
def test_placeholders_that_do_not_fit_the_pictures_are_refused(lengths: list[int], counts: list[int]) -> None:
    with pytest.raises(InvariantError):
        assign(lengths, counts)


def test_units_by_scope() -> None:
    pictures = [image([1, 2, 3, 4], grids=((1, 2), (1, 2))), image([5, 6]), image([7, 8, 9])]
    samples = [[0, 1], [], [2]]
    sizes = {
        scope: [unit.count for unit in make_units(pictures, samples, scope)]
        for scope in ("image", "crop", "total")
    }
    assert sizes == {"image": [4, 2, 3], "crop": [2, 2, 2, 3], "total": [6, 3]}
    ordinals = {
        scope: [unit.ordinal for unit in make_units(pictures, samples, scope)]
        for scope in ("image", "crop", "total")
    }
    assert ordinals == {"image": [0, 1, 0], "crop": [0, 1, 2, 0], "total": [0, 0]}, (
        "seeds start anew in every sample"
    )


def test_crops_that_are_no_rectangle_are_refused() -> None:
    picture = image([1, 2, 3, 4], grids=((2, 2),))
    picture.crops = lambda: torch.tensor([0, 0, 0, 1])
    with pytest.raises(InvariantError, match="not a rectangle"):
        make_units([picture], [[0]], "crop")


def test_a_budget_per_crop_of_a_picture_that_names_no_crops_is_refused() -> None:
    picture = Picture(torch.zeros(4, 2), ((2, 2),))
    with pytest.raises(InvariantError, match=r"picture 0 does not say .* without '/crop'"):
        make_units([picture], [[0]], "crop")


def test_a_budget_per_image_per_crop_and_for_all_images() -> None:
    pictures = [image([9, 1, 8, 7], grids=((1, 2), (1, 2))), image([2, 6, 3, 4])]
    assert kept(cut(pictures, [[0, 1]], 2)) == [[0, 2], [1, 3]]
    assert kept(cut(pictures, [[0, 1]], 1, "crop")) == [[0, 2], [1]]
    assert kept(cut(pictures, [[0, 1]], 3, "total")) == [[0, 2, 3], []]
    assert kept(cut(pictures, [[0], [1]], 3, "total")) == [[0, 2, 3], [1, 2, 3]]
    assert kept(cut(pictures, [[0, 1]], 0.5)) == [[0, 2], [1, 3]]


def test_pictures_that_stay_whole_are_none() -> None:
    pictures = [image([1, 2]), image([3, 4, 5, 6])]
    assert kept(cut(pictures, [[0, 1]], 3)) == [None, [1, 2, 3]]
    assert kept(cut(pictures, [[0, 1]], 1.0)) == [None, None]
    assert cut_pictures(pictures, [[0, 1]], First(), None, lambda x: x, needs=()) == [None, None]
    with pytest.raises(InvariantError, match=r"strict: keep=3 tokens but unit 0 holds 2"):
        cut(pictures, [[0, 1]], 3, strict=True)


def test_special_slots_stay_and_are_not_counted() -> None:
    one = cut([image([1, 5, 2, 6], special=(0, 3, 5))], [[0]], 2)[0]
    assert sorted(one.kept_slots.tolist()) == [0, 2, 3, 5, 6]  # [CLS] a B newline c newline D
    assert one.keep_idx.tolist() == [1, 3] and one.realised == 2


def test_rows_of_merging_methods_follow_their_order_where_nothing_stands_between() -> None:
    one = cut([image([0] * 6)], [[0]], 3, method=Reversed())[0]
    assert one.row_slots.tolist() == [0, 3, 4] and one.rows[:, 0].tolist() == [0, 1, 2], (
        "rows are read in the order the method gave"
    )
    assert sorted(one.kept_slots.tolist()) == [0, 3, 4]
    assert one.keep_idx.tolist() == [-1, 4, 3] and one.realised == 3


def test_rows_of_merging_methods_take_their_own_slot_between_newlines() -> None:
    one = cut([image([0] * 6, special=(3, 7))], [[0]], 3, method=Reversed())[0]  # slots 0 1 2 N 4 5 6 N
    placed = dict(zip(one.row_slots.tolist(), one.rows[:, 0].tolist(), strict=True))
    assert placed == {0: 0, 5: 1, 4: 2}, (
        "row 1 stands for token 4 at slot 5, row 2 for token 3 at slot 4, row 0 has no place"
    )
    assert sorted(one.kept_slots.tolist()) == [0, 3, 4, 5, 7]


def test_a_merging_method_cannot_spread_one_budget_over_images() -> None:
    with pytest.raises(UnsupportedError, match="scope image or crop"):
        cut([image([1, 2]), image([3, 4])], [[0, 1]], 2, "total", Reversed())


def test_keep_maps_name_image_and_frame() -> None:
    pictures = [
        image([1, 2, 3, 4], grids=((2, 2),)),
        image([5, 1, 6, 2], grids=((1, 2), (1, 2)), frames=True),
    ]
    report = Report(
        "first", grids=[one.grids for one in pictures], frames=[False, True], views=["stretch"] * 2
    )
    report.kept = [one.keep_idx for one in cut(pictures, [[0, 1]], 2)]
    found = [(one.index, one.frame, one.keep_idx.tolist(), one.total, one.grids) for one in report.keep]
    assert found == [(0, None, [2, 3], 4, ((2, 2),)), (1, 0, [0], 2, ((1, 2),)), (1, 1, [0], 2, ((1, 2),))]


@pytest.mark.parametrize("index", [[4, 1, 6], [-1, 5, 0, -1], [-1], [0, -1, 1], [6, 5, -1, 4, 3, 2, 1]])
def test_where_order_is_free_rows_take_the_same_places(index: list[int]) -> None:
    hosts = hosts_of(torch.arange(7), torch.tensor(index))
    assert torch.equal(all_hosts(7, torch.tensor(index)), hosts.sort().values)
