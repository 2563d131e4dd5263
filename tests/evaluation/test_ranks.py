# SPDX-License-Identifier: Apache-2.0
"""Correlations of ranks: against scipy, against all orders, and intervals that cover what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from vlmprune.evaluation.stats.ranks import kendall, permutation_test, rank_agreement, ranks, spearman

TIES = ([3.0, 1.0, 2.0, 2.0, 5.0, 4.0], [2.0, 1.0, 1.0, 3.0, 6.0, 6.0])


def test_by_hand() -> None:
    assert ranks(np.array([30.0, 10.0, 20.0, 20.0])).tolist() == [4, 1, 2.5, 2.5]
    x, y = np.arange(4.0), np.array([0.0, 1.0, 3.0, 2.0])  # one of six pairs is swapped
    assert kendall(x, y) == pytest.approx(4 / 6)
    assert spearman(x, y) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert spearman(x, -x) == pytest.approx(-1) and kendall(x, -x) == -1


def test_against_scipy() -> None:
    stats = pytest.importorskip(
        "scipy.stats", reason="scipy is not installed, it comes with the extra [test]"
    )
    rng = np.random.default_rng(0)
    cases = [tuple(map(np.array, TIES)), *(rng.integers(0, 6, (2, 12)).astype(float) for _ in range(20))]
    for x, y in cases:
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
        assert kendall(x, y) == pytest.approx(stats.kendalltau(x, y).statistic)
    exact = stats.permutation_test(
        (cases[0][0],),
        lambda one: stats.spearmanr(one, cases[0][1]).statistic,
        permutation_type="pairings",
        n_resamples=np.inf,
    )
    assert permutation_test(*cases[0]) == pytest.approx(exact.pvalue)


def test_random_orders_come_near_to_all_of_them() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.random((2, 7))
    eight = np.append(x, 2.0), np.append(y, 2.0)  # one more than all orders are tried of
    assert permutation_test(x, y, orders=7) == permutation_test(x, y)  # exact, whatever is asked for
    assert permutation_test(*eight) == pytest.approx(permutation_test(*eight, seed=1), abs=0.02)
    assert permutation_test(np.arange(12.0), np.arange(12.0), orders=99) == 1 / 100  # never 0


def test_what_has_no_order_has_no_agreement() -> None:
    assert rank_agreement([1, 2], [1, 2]) is None
    assert rank_agreement([1, 1, 1, 1], [1, 2, 3, 4]) is None
    three = rank_agreement([1, 2, 3], [1, 2, 3])
    assert three is not None and (three.spearman.low, three.spearman.high) == (-1, 1)  # three say nothing
    whole = rank_agreement(range(10), range(10))
    assert whole is not None and whole.spearman.value == pytest.approx(1) and whole.p < 0.001
    assert 0.95 < whole.spearman.low < whole.spearman.high <= 1 and 0.7 < whole.kendall.low < 1


def _coverage(n: int, rho: float, runs: int, seed: int) -> tuple[float, float]:
    """How often the intervals of Spearman and Kendall hold those of a normal law with correlation ``rho``."""
    rng = np.random.default_rng(seed)
    truth = 6 / np.pi * np.arcsin(rho / 2), 2 / np.pi * np.arcsin(rho)
    hits = np.zeros(2)
    for _ in range(runs):
        x = rng.standard_normal(n)
        found = rank_agreement(x, rho * x + np.sqrt(1 - rho**2) * rng.standard_normal(n))
        assert found is not None
        hits += [
            one.low <= true <= one.high
            for one, true in zip((found.spearman, found.kendall), truth, strict=True)
        ]
    return float(hits[0] / runs), float(hits[1] / runs)


@pytest.mark.parametrize("rho", [0.0, 0.7])
def test_intervals_over_ten_methods_cover(rho: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmprune.evaluation.stats.ranks.permutation_test", lambda x, y: 1.0)  # not looked at
    assert min(_coverage(10, rho, 600, 0)) >= 0.92


def _coverage_of_seeds(spread: float, runs: int) -> float:
    """How often the interval of a mean over three seeds holds the Spearman of what all seeds share."""
    rng, hits, rho = np.random.default_rng(3), 0, 0.7
    truth = 6 / np.pi * np.arcsin(rho / 2)
    for _ in range(runs):
        x = rng.standard_normal(12)
        y = rho * x + np.sqrt(1 - rho**2) * rng.standard_normal(12)
        seeds = x + spread * rng.standard_normal((3, 12))
        found = rank_agreement(seeds.mean(axis=0), y, seeds=seeds)
        assert found is not None
        hits += found.spearman.low <= truth <= found.spearman.high
    return hits / runs


@pytest.mark.parametrize("spread", [pytest.param(0.1, marks=pytest.mark.slow), 0.5])
def test_intervals_of_a_mean_over_seeds_cover(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmprune.evaluation.stats.ranks.permutation_test", lambda x, y: 1.0)  # not looked at
    assert _coverage_of_seeds(spread, 300) >= 0.93


def test_seeds_that_differ_widen_the_interval_and_those_that_do_not_leave_it() -> None:
    x, y = np.arange(12.0), np.array([1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10.0])
    alone = rank_agreement(x, y)
    same = rank_agreement(x, y, seeds=[x, x, x])
    noise = np.random.default_rng(0).normal(0, 4, (2, 12))
    differ = rank_agreement(x, y, seeds=[x + noise[0], x + noise[1], x - noise.sum(axis=0)])
    assert alone is not None and same is not None and differ is not None
    assert same.spearman == alone.spearman and same.by_seed == (alone.spearman.value,) * 3
    assert differ.spearman.value == alone.spearman.value and differ.p == alone.p
    assert differ.spearman.low < alone.spearman.low and differ.spearman.high > alone.spearman.high
    assert differ.kendall.low < alone.kendall.low and alone.by_seed == ()
    assert rank_agreement(x, y, seeds=[x, np.ones(12)]) is None  # one that has no order


@pytest.mark.slow
@pytest.mark.parametrize("n", [10, 16])
@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8, 0.9])
def test_intervals_cover_in_all_cases(n: int, rho: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmprune.evaluation.stats.ranks.permutation_test", lambda x, y: 1.0)
    of_spearman, of_kendall = _coverage(n, rho, 3000, 1)
    # Fieller's error of tau is too small near 1
    assert of_spearman >= 0.93 and of_kendall >= (0.89 if rho == 0.9 else 0.93)
