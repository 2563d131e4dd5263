# SPDX-License-Identifier: Apache-2.0
"""PruneVid: scenes, still places, counts and rows; what is kept inside the language model."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from vlmprune.core.select import choose, choose_own
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import SpecError
from vlmprune.methods.prunevid import PruneVid, PruneVidInside, refined, sameness, shares_with_one
from vlmprune.spec import Budget


def clip_of(frames: int, n: int, seed: int, width: int = 8) -> VisualTokens:
    """Two scenes, in which every second place stands still."""
    random = torch.Generator().manual_seed(seed)
    scene = torch.randn(2, n, width, generator=random).repeat_interleave(-(-frames // 2), dim=0)[:frames]
    noise = torch.randn(frames, n, width, generator=random)
    noise[:, ::2] *= 0.05
    return VisualTokens(features=(scene + noise).flatten(0, 1)[None], grids=((1, n),) * frames, frames=True)


@pytest.mark.parametrize(
    ("labels", "scenes"),
    [
        ("0011122", [2, 3, 2]),
        ("0010022", [5, 2]),  # the two runs of 0 are as long: both stay, and the single frame joins the left
        ("0012222", [2, 5]),  # the longer neighbour: here the right one
        ("0001222", [4, 3]),  # equal neighbours: the left one
        ("0120", [4]),  # no label has a run: all are one scene
        ("00010111", [5, 3]),  # only the longest run of a label stays; the left neighbour is as long
        ("5", [1]),
    ],
)
def test_scenes_are_contiguous_and_short_runs_join_their_neighbours(labels: str, scenes: list[int]) -> None:
    found = refined([int(c) for c in labels])
    lengths = [stop - start for start, stop in found]
    assert found[0][0] == 0 and found[-1][1] == len(labels)
    assert lengths == scenes


def test_sameness_is_the_mean_cosine_of_all_pairs() -> None:
    x = torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(0))
    u = (x / x.norm(dim=-1, keepdim=True)).double().numpy()
    want = np.mean([(u[a] * u[b]).sum(-1) for a, b in combinations(range(5), 2)], axis=0)
    np.testing.assert_allclose(sameness(x).numpy(), want, atol=1e-6)
    assert bool((sameness(x[:1]) == -1).all())


@pytest.mark.parametrize(("frames", "n"), [(1, 9), (2, 5), (8, 6), (5, 16)])
def test_every_budget_gives_exactly_as_many_rows(frames: int, n: int) -> None:
    tokens = clip_of(frames, n, seed=frames)
    for k in range(1, frames * n):
        merged = choose(PruneVid(), tokens, k)
        assert merged.features.shape[1] == k and bool((merged.slots[0].diff() > 0).all())


def test_a_group_with_places_gets_a_row_while_there_are_enough() -> None:
    assert shares_with_one([100, 1, 0, 1], 5) == [3, 1, 0, 1]
    assert shares_with_one([100, 1, 0, 1], 2) == [2, 0, 0, 0]
    assert shares_with_one([10, 10], 6) == [3, 3]


def test_rows_are_plain_means_of_their_clusters() -> None:
    random = torch.Generator().manual_seed(1)
    heart = 4 * torch.randn(3, 6, generator=random)
    x = (heart.repeat_interleave(4, dim=0) + 0.1 * torch.randn(12, 6, generator=random)).expand(5, 12, 6)
    x = x + 0.01 * torch.randn(5, 12, 6, generator=random)
    tokens = VisualTokens(features=x.flatten(0, 1)[None], grids=((3, 4),) * 5, frames=True)
    merged = choose(PruneVid(neighbours=3), tokens, 3)
    slots = merged.slots[0].tolist()
    assert [slot // 4 for slot in slots] == [0, 1, 2]  # one of each heap, in the first frame
    torch.testing.assert_close(merged.features[0], x.mean(0).view(3, 4, 6).mean(1))


def test_the_official_count_is_half_of_large_groups_and_all_of_small_ones() -> None:
    method = PruneVid(variant="official")
    assert [method.official_count(size) for size in (0, 14, 15, 36)] == [0, 14, 7, 18]
    (merged,) = choose_own(method, clip_of(6, 16, seed=2))
    assert 0 < merged.slots.shape[0] < 96


# --- inside the language model --------------------------------------------------------------------


def test_the_largest_attention_of_any_head_and_word_counts() -> None:
    A = torch.rand(2, 3, 4, 10, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 4, dtype=torch.bool)
    A[1, :, 3] = 2  # not a word of this row
    mask[1, 3] = False
    tokens = VisualTokens(text_attention=A, query_mask=mask)
    found = PruneVidInside().score(tokens)
    torch.testing.assert_close(found[0], A[0].amax((0, 1)))
    torch.testing.assert_close(found[1], A[1, :, :3].amax((0, 1)))


def test_the_cut_is_as_deep_as_the_published_one() -> None:
    (cut,) = PruneVidInside().cuts(32, Budget(0.4), 100)
    assert (cut.layer, cut.keep, cut.source) == (11, 40, 10)
    with pytest.raises(SpecError, match=r"layer=32 but the language model has layers 0..31"):
        PruneVidInside(layer=32).cuts(32, Budget(0.5), 40)
    with pytest.raises(SpecError, match=r"prunevid_inside@0.4"):
        PruneVidInside().cuts(32, None, 40)
