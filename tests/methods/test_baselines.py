# SPDX-License-Identifier: Apache-2.0
"""Baselines: reproducible, independent of the batch, and literally what their names say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlmprune.core.grid import cells, centres
from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import CaptureError, SpecError
from vlmprune.methods.baselines import Dense, Pool, Random, Uniform


def tokens(batch=2, grid=(6, 6), dtype=torch.float32, **more):
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(batch, grid[0] * grid[1], 5, generator=generator).to(dtype)
    return VisualTokens(features=features, grids=(grid,), **more)


def test_dense_scores_all_alike_and_takes_no_budget():
    assert not Dense.budgeted
    assert Dense().score(tokens()).unique().tolist() == [1.0]


def test_random_depends_on_seed_and_ordinal_only():
    both = choose(Random(1), tokens(ordinal=torch.tensor([4, 7])), 9)
    alone = choose(Random(1), tokens(batch=1, ordinal=torch.tensor([7])), 9)
    assert both[1].tolist() == alone[0].tolist()
    assert both[0].tolist() != both[1].tolist()
    assert both[0].tolist() != choose(Random(2), tokens(ordinal=torch.tensor([4, 7])), 9)[0].tolist()
    assert (
        both.tolist()
        == choose(Random(1), tokens(ordinal=torch.tensor([4, 7]), dtype=torch.bfloat16), 9).tolist()
    )


def test_the_next_seed_is_not_the_next_image():
    one = Random(0).score(tokens(batch=1, ordinal=torch.tensor([1])))
    other = Random(1).score(tokens(batch=1, ordinal=torch.tensor([0])))
    assert not torch.equal(one, other)


def test_random_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    Random().score(tokens())
    assert torch.equal(before, torch.get_rng_state())


def test_random_keeps_every_token_equally_often():
    many = tokens(batch=400, ordinal=torch.arange(400))
    hits = torch.bincount(choose(Random(), many, 9).flatten(), minlength=36)
    assert 60 <= hits.min() and hits.max() <= 140  # mean 100, standard deviation 8.7


def test_uniform_keeps_whole_blocks_where_it_is_asked_to():
    clip = VisualTokens(features=torch.zeros(2, 8 * 6, 1), grids=((2, 3),) * 8, frames=True)
    frames = [keep // 6 for keep in choose(Uniform(whole=True), clip, 12)[0].tolist()]
    assert frames == [2] * 6 + [6] * 6
    more = choose(Uniform(whole=True), clip, 15)[1].tolist()
    assert [keep // 6 for keep in more] == [1] * 6 + [4] * 6 + [6] * 3
    assert [keep - 36 for keep in more[12:]] == centres([(2, 3)], 3).tolist()
    tiles = VisualTokens(features=torch.zeros(1, 13, 1), grids=((1, 9), (2, 2)))
    assert choose(Uniform(whole=True), tiles, 3)[0].tolist() == [9 + i for i in centres([(2, 2)], 3).tolist()]
    assert choose(Uniform(whole=True), tokens(), 9).tolist() == choose(Uniform(), tokens(), 9).tolist()
    with pytest.raises(SpecError, match="whole=2 is unknown"):
        Uniform(whole=2)


@pytest.mark.parametrize("seed", [-1, 1.5, True, "0", 2**32])
def test_random_refuses_what_is_no_seed(seed):
    with pytest.raises(SpecError, match="seed="):
        Random(seed)


@pytest.mark.parametrize("k", [1, 5, 9, 20, 36])
def test_uniform_keeps_the_centres_in_every_row(k):
    assert choose(Uniform(), tokens(), k).tolist() == [centres([(6, 6)], k).tolist()] * 2


@pytest.mark.parametrize("k", [1, 5, 9, 20, 36])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pool_is_the_mean_of_every_cell(k, dtype):
    given = tokens(dtype=dtype)
    merged = Pool().merge(given, k)
    ids, x = cells([(6, 6)], k).numpy(), given.features.float().numpy()
    expected = np.stack([x[:, ids == cell].mean(1) for cell in range(k)], axis=1)
    assert merged.features.dtype == dtype
    rtol = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(merged.features, torch.from_numpy(expected).to(dtype), rtol=rtol, atol=1e-6)
    assert merged.slots.tolist() == [centres([(6, 6)], k).tolist()] * 2


@pytest.mark.parametrize("method", [Uniform(), Pool()])
def test_grid_methods_say_when_the_grid_is_missing(method):
    with pytest.raises(CaptureError, match="grids"):
        choose(method, VisualTokens(features=torch.ones(1, 4, 2)), 2)


def test_pool_ignores_grids_without_a_cell():
    given = VisualTokens(features=torch.tensor([[[1.0], [3.0], [100.0]]]), grids=((1, 2), (1, 1)))
    assert Pool().merge(given, 1).features.tolist() == [[[2.0]]]
