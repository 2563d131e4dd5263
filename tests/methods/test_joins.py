# SPDX-License-Identifier: Apache-2.0
"""What merged rows are made of: each is the mean of the tokens that are said to be part of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vlmprune.core.method import Merged, Method
from vlmprune.core.select import choose, choose_own
from vlmprune.core.tokens import VisualTokens
from vlmprune.methods.baselines import Pool
from vlmprune.methods.holitom import HoliTom
from vlmprune.methods.prunevid import PruneVid
from vlmprune.methods.visionzip import VisionZip

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


def test_units_of_which_one_says_nothing_say_nothing() -> None:
    rows, slots = torch.zeros(1, 2, 3), torch.tensor([[0, 1]])
    told: Any = Merged(rows, slots, joins=lambda: torch.tensor([[0, 1, 1]]))
    assert Merged.batch([told, Merged(rows, slots)]).joins is None
    both = Merged.batch([told, told]).joins
    assert both is not None and both().tolist() == [[0, 1, 1]] * 2
