# SPDX-License-Identifier: Apache-2.0
"""ToMe against a twin that matches rows one by one, and its properties inside a tower."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import vlmprune
from vlmprune.core.encoder import EncoderBlock
from vlmprune.hooks.slots.encoder import Shortening
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


def averaged(model: Any, inputs: dict[str, Tensor], spec: str) -> tuple[list[Any], list[Tensor]]:
    """Keep maps of a forward, and which patches (crops, n, n) each patch in the last block is a mean of."""
    with torch.no_grad(), vlmprune.prune(model, spec) as run:
        slot, shares = run.slots["encoder"], []
        own = Shortening.shorten

        def follow(self: Shortening, patches: Tensor, answer: Any) -> Tensor:
            # unit vectors go the way of the patches
            if not shares or shares[-1][0] is not self:
                crops = len(patches)
                shares.append([self, torch.eye(self.total).expand(crops, -1, -1)])
            shares[-1][1] = own(replace(self, steps=[]), shares[-1][1], answer)
            return own(self, patches, answer)

        Shortening.shorten = follow  # type: ignore[method-assign]
        try:
            model(**inputs)
        finally:
            Shortening.shorten = own  # type: ignore[method-assign]
        assert slot.blocks and run.last is not None
        found = []
        for step, rows in shares:
            full = torch.zeros(len(rows), step.total, step.total)
            full.scatter_(1, step.index[..., None].expand_as(rows), rows)
            found.append(full > 0)
        return run.last.keep, found


def test_maps_name_the_patches_of_every_mean() -> None:
    model, inputs = tiny_model(), tiny_inputs(images=(1, 1))
    maps, (parts,) = averaged(model, inputs, "tome@9")
    assert len(maps) == 2
    for kept, of_patch in zip(maps, parts, strict=True):
        assert len(kept) == 9 and kept.joins is not None and int(kept.merged.sum()) == 27
        for token in range(36):
            assert kept.members(token).tolist() == of_patch[token].nonzero()[:, 0].tolist()


def test_of_tiles_a_patch_goes_where_its_mean_is() -> None:
    model, inputs = tiny_model("llava_next"), tiny_inputs("llava_next")
    (kept,), (parts,) = averaged(model, inputs, "tome@9/crop")
    assert kept.joins is not None
    # the base crop stands first
    for token in range(36):
        assert kept.members(token).tolist() == parts[0, token].nonzero()[:, 0].tolist()
    assert set(kept.joins.unique().tolist()) - {-1} == {*kept.keep_idx.tolist()}
    # no mean reaches over the border of a crop
    assert bool((kept.joins[36:] >= 36).logical_or(kept.joins[36:] < 0).all())


def test_further_cuts_take_the_means_along() -> None:
    model, inputs = tiny_model(), tiny_inputs()
    (first,), _ = averaged(model, inputs, "tome@9")
    (later,), _ = averaged(model, inputs, "tome@9+fastv(layer=2)@4")
    assert len(later) == 4
    for token in later.keep_idx.tolist():
        assert torch.equal(later.members(token), first.members(token))
    assert int((later.joins >= 0).sum()) == sum(
        len(later.members(token)) for token in later.keep_idx.tolist()
    )


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
