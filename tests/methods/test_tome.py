# SPDX-License-Identifier: Apache-2.0
"""ToMe against a twin that matches rows one by one, and its properties inside a tower."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import vlmprune
from vlmprune.core.encoder import EncoderBlock
from vlmprune.methods.tome import ToMe
from vlmprune.testing.tiny import tiny_inputs, tiny_model


def block_of(keys: Tensor, left: int) -> EncoderBlock:
    """A block whose keys (T, H, n, d) were given."""
    crops, _, n = keys.shape[:3]
    ones = torch.ones(crops, n)
    return EncoderBlock(left, torch.zeros(crops, n, 2), keys, keys, ones, ones.bool())


def matched(keys: Tensor, goal: int) -> tuple[list[int], dict[int, int]]:
    """Rows that stay and the row that every other one joins, for one crop with mean keys (n, d)."""
    rows, joins = list(range(len(keys))), {}
    while len(rows) > goal:
        a, b = rows[::2], rows[1::2]
        pairs = []
        for number, one in enumerate(a):
            likeness = [float(torch.cosine_similarity(keys[one], keys[other], dim=0)) for other in b]
            best = max(range(len(b)), key=likeness.__getitem__)
            pairs.append((-likeness[best], number, b[best]))
        for _, number, target in sorted(pairs)[: min(len(rows) - goal, len(a), len(b))]:
            joins[a[number]] = target
        rows = [row for row in rows if row not in joins]
    return rows, joins


@pytest.mark.parametrize(("n", "k", "left"), [(36, 9, 5), (36, 3, 1), (15, 14, 0), (49, 1, 0), (2, 1, 1)])
def test_pairs_equal_a_twin_that_matches_row_by_row(n: int, k: int, left: int) -> None:
    keys = torch.randn(2, 3, n, 8, generator=torch.Generator().manual_seed(n))
    answer = ToMe().shorten(block_of(keys, left), k)
    goal = n + (k - n) // max(left, 1)
    for crop in range(2):
        rows, joins = matched(keys[crop].mean(dim=0), goal)
        assert answer.keep[crop].nonzero()[:, 0].tolist() == rows
        for row in range(n):
            target = row
            while target in joins:
                target = joins[target]
            assert int(answer.into[crop, row]) == target


def test_equal_rows_merge_into_the_lower_index_and_no_crop_looks_at_another() -> None:
    keys = torch.ones(1, 1, 6, 4)
    answer = ToMe().shorten(block_of(keys, 1), 5)
    assert answer.into[0].tolist() == [1, 1, 2, 3, 4, 5]
    keys = torch.randn(2, 2, 16, 4, generator=torch.Generator().manual_seed(0))
    both = ToMe().shorten(block_of(keys, 2), 6)
    alone = ToMe().shorten(block_of(keys[1:], 2), 6)
    assert torch.equal(both.keep[1], alone.keep[0]) and torch.equal(both.into[1], alone.into[0])


def test_sizes_add_up_to_the_picture() -> None:
    """Every patch is in exactly one row, which the bias on later logits is the log of."""
    model, inputs = tiny_model(), tiny_inputs()
    biases: list[Tensor] = []
    with torch.no_grad(), vlmprune.prune(model, "tome@9") as run:
        slot = run.slots["encoder"]
        handle = slot.blocks[-1].register_forward_pre_hook(
            lambda module, args: biases.append(slot._run().bias(slot.prefix))
        )
        model(**inputs)
        handle.remove()
    sizes = biases[0][0, 0, 0].exp()
    assert sizes[0] == 1, "[CLS] stands for itself"
    assert math.isclose(float(sizes[1:].sum()), 36, rel_tol=1e-5)
