# SPDX-License-Identifier: Apache-2.0
"""What merged rows are made of: each is the mean of the tokens that are said to be part of it, or follows
these and no others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmprune.core.merged import names_of, through
from vlmprune.core.method import Merged, Method, Need
from vlmprune.core.select import choose, choose_own
from vlmprune.core.tokens import VisualTokens
from vlmprune.methods.baselines import Pool
from vlmprune.methods.fastvid import FastVID
from vlmprune.methods.holitom import HoliTom
from vlmprune.methods.holitom.inner import HoliTomInner
from vlmprune.methods.prumerge import PruMerge
from vlmprune.methods.prunevid import PruneVid
from vlmprune.methods.sparsevlm import SparseVLM
from vlmprune.methods.visionzip import VisionZip
from vlmprune.methods.vscan import VScan

FRAMES, SIDE, WIDTH = 6, 4, 8
COUNT = FRAMES * SIDE * SIDE


def clips(batch: int = 2) -> VisualTokens:
    """Two scenes each, in which half of the places stand still."""
    random = torch.Generator().manual_seed(5)
    scene = torch.randn(batch, 2, SIDE * SIDE, WIDTH, generator=random).repeat_interleave(FRAMES // 2, dim=1)
    noise = torch.randn(batch, FRAMES, SIDE * SIDE, WIDTH, generator=random)
    noise[:, :, ::2] *= 0.05
    return VisualTokens(
        features=(scene + noise).flatten(1, 2),
        keys=torch.randn(batch, COUNT, WIDTH, generator=random),
        received_attention=torch.rand(batch, COUNT, generator=random),
        grids=((SIDE, SIDE),) * FRAMES,
        frames=True,
    )


def check(rows: Tensor, slots: Tensor, joins: Tensor, features: Tensor) -> None:
    """Of one unit: rows (k, D), slots (k,), joins (N,), features (N, D)."""
    assert joins.shape == (COUNT,) and int(joins.min()) >= -1
    for number, (row, slot) in enumerate(zip(rows, slots.tolist(), strict=True)):
        assert joins[slot] == number
        torch.testing.assert_close(row, features[joins == number].mean(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("k", [7, 30, 70])
@pytest.mark.parametrize(
    "method",
    [Pool(), PruneVid(), HoliTom(beta=None), VisionZip(cls="mean", combine="mean", place="after")],
    ids=lambda method: method.name,
)
def test_a_row_is_the_mean_of_what_joins_it(method: Method, k: int) -> None:
    tokens = clips()
    made = choose(method, tokens, k)
    assert isinstance(made, Merged) and made.joins is not None
    joins = made.joins()
    for unit in range(tokens.batch):
        check(made.features[unit], made.slots[unit], joins[unit], tokens.need("features")[unit])
        alone = made.unit(unit)
        assert alone.joins is not None and torch.equal(alone.joins(), joins[unit])
    if method.name in ("pool", "visionzip"):
        assert bool((joins >= 0).all())  # nothing is dropped


@pytest.mark.parametrize(
    "method", [PruneVid(variant="official"), HoliTom(variant="official", beta=None)], ids=lambda one: one.name
)
def test_so_it_is_where_the_authors_count(method: Method) -> None:
    tokens = clips()
    for unit, made in enumerate(choose_own(method, tokens)):
        assert isinstance(made, Merged) and made.joins is not None
        check(made.features, made.slots, made.joins(), tokens.need("features")[unit])


def with_gradient() -> VisualTokens:
    """The same clips with all that merging methods read; rows are made of what requires a gradient."""
    tokens = clips()
    random = torch.Generator().manual_seed(6)
    x = tokens.need("features").requires_grad_()

    def attention(*heads: int) -> Tensor:
        return torch.rand(tokens.batch, *heads, COUNT, generator=random) + 0.01

    return replace(
        tokens,
        encoder_features=x,
        projector=lambda rows: rows,
        wide_keys=tokens.keys,
        wide_attention=attention(),
        cls_attention=attention(2),
        cls_features=x[:, :1] * 0 + 1,
        text_attention=attention(2, 3),
        of_layers={Need("cls_attention", 6): attention(2)},
    )


def follows(rows: Tensor, x: Tensor) -> Tensor:
    """(k, N) bool, which tokens x (B, N, D) of any unit each of rows (k, D) changes with."""
    found = [torch.autograd.grad(row.sum(), x, retain_graph=True)[0] for row in rows]
    return torch.stack([(one != 0).any(dim=2).any(dim=0) for one in found])


@pytest.mark.parametrize(
    ("method", "k"),
    [
        (FastVID(), 20),
        (FastVID(p=1, segments=2, d=0.8), 60),
        (FastVID(beta=0.2, tau=-1.0, segments=1, p=2), 31),
        (PruMerge(), 9),
        (PruMerge(plus=True, neighbours=5, extra="mean"), 30),
        (PruMerge(extra="none", order="official"), 12),
        (SparseVLM(), 40),
        (SparseVLM(recycle=False), 40),
        (VScan(window=2), 33),
        (VScan(merging="none"), 33),
        (HoliTomInner(), 25),
        (HoliTomInner(combine="sequential"), 25),
        (HoliTom(), 30),
        (VisionZip(place="after"), 24),
        (VisionZip(), 24),
        (Pool(), 30),
    ],
    ids=lambda one: str(one),
)
def test_a_row_changes_with_what_joins_it_and_with_nothing_else(method: Method, k: int) -> None:
    tokens = with_gradient()
    made = choose(method, tokens, k)
    assert isinstance(made, Merged) and made.joins is not None
    joins, x = made.joins(), tokens.need("features")
    for unit in range(tokens.batch):
        rows = torch.arange(k)[:, None]
        said = (joins[unit] == rows) if joins.ndim == 2 else (joins[unit] == rows[..., None]).any(dim=2)
        crops = int(made.slots[unit, 0] < 0) if method.name == "visionzip" else 0
        # a [CLS] row is made of no patch
        assert not said[:crops].any()
        assert torch.equal(said[crops:], follows(made.features[unit, crops:], x))


@pytest.mark.parametrize(
    "method", [FastVID(variant="official", rule=rule) for rule in ("onevision", "video", "qwen")], ids=str
)
def test_so_it_does_where_the_authors_count(method: Method) -> None:
    tokens = with_gradient()
    for made in choose_own(method, tokens):
        assert isinstance(made, Merged) and made.joins is not None
        rows = torch.arange(len(made.slots))[:, None, None]
        assert torch.equal((made.joins() == rows).any(dim=2), follows(made.features, tokens.need("features")))


def test_joins_of_units_in_one_batch_are_filled_up() -> None:
    rows, slots = torch.zeros(1, 2, 3), torch.tensor([[0, 1]])
    flat = Merged(rows, slots, joins=lambda: torch.tensor([[0, 1, -1]]))
    deep = Merged(rows, slots, joins=lambda: torch.tensor([[[0, 1], [1, -1], [-1, -1]]]))
    both = Merged.batch([flat, deep]).joins
    assert both is not None
    assert both().tolist() == [[[0, -1], [1, -1], [-1, -1]], [[0, 1], [1, -1], [-1, -1]]]


def test_rows_are_named_by_their_token_or_by_their_order_without_one() -> None:
    assert names_of(torch.tensor([4, -1, 2, -1])).tolist() == [4, -2, 2, -3]
    joins, step = torch.tensor([1, -1, 0]), torch.tensor([7, -2])
    assert through(joins, step).tolist() == [-2, -1, 7]
    assert through(joins[:, None], step).tolist() == [[-2], [-1], [7]]
    assert through(joins, torch.tensor([[5, 6], [0, -1]])).tolist() == [[0, -1], [-1, -1], [5, 6]]
    assert through(joins, step[:0]).tolist() == [-1, -1, -1]


def test_units_of_which_one_says_nothing_say_nothing() -> None:
    rows, slots = torch.zeros(1, 2, 3), torch.tensor([[0, 1]])
    told: Any = Merged(rows, slots, joins=lambda: torch.tensor([[0, 1, 1]]))
    assert Merged.batch([told, Merged(rows, slots)]).joins is None
    both = Merged.batch([told, told]).joins
    assert both is not None and both().tolist() == [[0, 1, 1]] * 2
