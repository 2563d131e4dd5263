# SPDX-License-Identifier: Apache-2.0
"""Keep maps name what rows are made of, through every cut of a forward.

Features are unit vectors here, so that a row shows which patches it is a sum of.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import vlmprune
from vlmprune.core.budget import Budget
from vlmprune.core.keepmap import KeepMap
from vlmprune.core.merged import Merged, names_of
from vlmprune.core.method import Method, needs_of
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import SpecError
from vlmprune.hooks.slots.before_lm import cut_pictures
from vlmprune.hooks.slots.cutting import Cut
from vlmprune.hooks.slots.spans import Span, apply_choice
from vlmprune.hooks.vision.pictures import Picture
from vlmprune.methods.sparsevlm.recycling import recycle
from vlmprune.testing.tiny import tiny_inputs, tiny_model

N = 24


class Sums(Method):
    """Rows are sums of a few tokens, which may be in several rows; every third row has no place."""

    name, needs = "sums", ("features",)

    def merge(self, tokens: VisualTokens, k: int) -> Merged:
        x = tokens.need("features")
        random = torch.Generator().manual_seed(k)
        within = torch.rand(k, tokens.count, generator=random) < 0.3
        slots = torch.randperm(tokens.count, generator=random)[:k]
        slots[2::3] = -1
        rows = within.to(x.dtype) @ x
        placed = torch.where(within.T, torch.arange(k), -1)  # (N, k)
        return Merged(rows, slots.expand(len(x), -1), joins=lambda: placed.expand(len(x), -1, -1))


class Quiet(Sums):
    """The same, and does not say it."""

    name = "quiet"

    def merge(self, tokens: VisualTokens, k: int) -> Merged:
        made = super().merge(tokens, k)
        return Merged(made.features, made.slots)


def picture(special: tuple[int, ...] = (), crops: Callable[[], Tensor] | None = None) -> Picture:
    """N patches, whose features are unit vectors, among newlines."""
    marks = torch.zeros(N + len(special), dtype=torch.bool)
    marks[list(special)] = True
    features = torch.zeros(len(marks), N)
    features[~marks] = torch.eye(N)
    return Picture(features, ((4, 6),), special=marks if special else None, crops=crops)


def cut_of(one: Picture, method: Method, keep: str, in_place: bool = False) -> Cut:
    (cut,) = cut_pictures(
        [one], [[0]], method, Budget.of(keep), lambda x: x, needs=needs_of(method), in_place=in_place
    )
    assert cut is not None
    return cut


def check(joins: Tensor, names: Tensor, rows: Tensor) -> None:
    """Joins (N,) or (N, J) say of each row, by its name, which patches rows (k, N) are sums of."""
    deep = joins if joins.ndim > 1 else joins[:, None]
    for name, row in zip(names.tolist(), rows, strict=True):
        assert (deep == name).any(dim=1).tolist() == (row != 0).tolist()
    assert set(deep.unique().tolist()) <= {-1, *names.tolist()}


CUTS = [
    (picture(), "9", False),
    (picture(), "9", True),
    (picture((0, 7, 9)), "9", False),
    (picture((3,), lambda: torch.arange(N) // 12), "4/crop", False),
]


@pytest.mark.parametrize(("one", "keep", "in_place"), CUTS, ids=lambda value: str(value)[:12])
def test_before_the_language_model(one: Picture, keep: str, in_place: bool) -> None:
    cut = cut_of(one, Sums(), keep, in_place)
    assert cut.joins is not None and cut.rows is not None
    check(cut.joins(), names_of(cut.keep_idx), cut.rows)


@pytest.mark.parametrize(("one", "keep", "in_place"), CUTS, ids=lambda value: str(value)[:12])
def test_and_further_through_cuts_inside_it(one: Picture, keep: str, in_place: bool) -> None:
    cut = cut_of(one, Sums(), keep, in_place)
    assert cut.row_slots is not None and cut.rows is not None
    order = cut.row_slots.argsort()
    rows, patches = cut.rows[order][None], cut.row_slots[order]
    span = Span(0, torch.arange(len(patches)), patches, 0, True, 0, one)
    span.take(cut)
    for index in ([0, 2, 3, 5, 7], [1, 2, 4]):
        apply_choice([span], [torch.tensor(index)], rows)
        rows = rows[:, span.columns]
        span.columns = torch.arange(span.count)
        assert span.joins is not None and span.kept is not None
        check(span.joins(), names_of(span.kept), rows[0])


def test_several_merging_cuts_inside_it() -> None:
    random = torch.Generator().manual_seed(3)
    one = picture()
    span = Span(0, torch.arange(N), None, 0, True, 0, one)
    rows = torch.eye(N)[None]
    for kept in (12, 6, 3):
        made = recycle(rows, torch.rand(1, span.count, generator=random), kept)
        rows = apply_choice([span], made, rows)[:, span.columns]
        span.columns = torch.arange(span.count)
        assert span.joins is not None and span.kept is not None
        check(span.joins(), names_of(span.kept), rows[0])
        apply_choice([span], [torch.arange(span.count)[1:]], rows)
        rows = rows[:, span.columns]
        span.columns = torch.arange(span.count)
        check(span.joins(), names_of(span.kept), rows[0])


def test_of_rows_that_were_merged_untold_nothing_is_said() -> None:
    cut = cut_of(picture(), Quiet(), "9")
    assert cut.joins is None and cut.row_slots is not None
    span = Span(0, torch.arange(9), cut.row_slots, 0, True, 0, picture())
    span.take(cut)
    apply_choice([span], recycle(torch.eye(9)[None], torch.rand(1, 9), 3), torch.eye(9)[None])
    assert span.joins is None
    # of two crops, one of which is said
    told = cut_of(picture(crops=lambda: torch.arange(N) // 12), Quiet(), "4/crop")
    assert told.joins is None


def names(kept: KeepMap) -> set[int]:
    assert kept.joins is not None
    return set(kept.joins.unique().tolist()) - {-1}


@pytest.mark.parametrize("spec", ["sparsevlm@20", "holitom_inner(layer=2)@9", "visionzip@20", "prumerge@9"])
def test_maps_of_a_model_name_every_row(spec: str) -> None:
    model = tiny_model("llava")
    with torch.no_grad(), vlmprune.prune(model, spec) as run:
        model(**tiny_inputs("llava", images=(1, 2)))
        assert run.last is not None
        for kept, left in zip(run.last.keep, run.last.realised_tokens, strict=True):
            placeless = left - len(kept)
            rows = {*kept.keep_idx.tolist(), *range(-1 - placeless, -1)}
            # the [CLS] row of visionzip, its first without a place, is made of no patch
            assert names(kept) == rows - ({-2} if "visionzip" in spec else set())
            for token in kept.keep_idx.tolist():
                assert token in kept.members(token)


def test_a_row_that_leaves_takes_its_tokens_along() -> None:
    model, inputs = tiny_model("llava"), tiny_inputs("llava", images=(1,))
    found = []
    with torch.no_grad():
        for spec in ("visionzip@20", "visionzip@20+pyramiddrop(layers=(1,))@0.5"):
            with vlmprune.prune(model, spec) as run:
                model(**inputs)
                assert run.last is not None
                found.append(run.last.keep[0])
    first, later = found
    assert 0 < len(later) < len(first) and {*later.keep_idx.tolist()} < {*first.keep_idx.tolist()}
    for token in later.keep_idx.tolist():
        assert torch.equal(later.members(token), first.members(token))
    assert names(later) - {-2, -3} == {*later.keep_idx.tolist()}


def test_maps_with_tokens_in_several_rows(tmp_path) -> None:
    kept = KeepMap([1], 3, ((1, 3),), joins=[[1, -2], [1, -1], [-1, -1]])
    assert kept.members(1).tolist() == [0, 1] and kept.members(-2).tolist() == [0]
    assert kept.merged.tolist() == [True, False, False]
    with pytest.raises(SpecError, match="-1 stands for no row"):
        kept.members(-1)
    for name in ("map.json", "map.safetensors"):
        kept.save(tmp_path / name)
        assert torch.equal(KeepMap.load(tmp_path / name).joins, kept.joins)
    with pytest.raises(SpecError, match="one or two axes"):
        KeepMap([1], 3, ((1, 3),), joins=torch.zeros(3, 1, 1))
