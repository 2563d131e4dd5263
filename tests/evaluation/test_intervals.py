# SPDX-License-Identifier: Apache-2.0
"""Intervals cover what they promise, also near 98 % and with five clusters; quantiles are those of scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vlmprune.evaluation.stats.intervals import (
    beta_quantile,
    difference_interval,
    share_interval,
    t_quantile,
    variance_of_means,
)

Sizes = tuple[int, int]  # fewest and most questions of a cluster
# clusters, accuracy, correlation of the questions of a cluster, sizes
NEAR_THE_EDGE = [
    (200, 0.98, 0.0, (1, 1)),
    (100, 0.98, 0.2, (1, 7)),
    (200, 0.98, 0.2, (1, 7)),
    (150, 0.97, 0.1, (1, 5)),
    (60, 0.95, 0.2, (1, 7)),
    (200, 0.02, 0.2, (1, 3)),
]
FIVE = [(5, 0.5, 0.33, (1, 7)), (5, 0.7, 0.2, (20, 60)), (5, 0.9, 0.1, (20, 60)), (5, 0.98, 0.1, (20, 60))]
TWENTY_LARGE = [
    (20, 0.95, 0.2, (50, 150)),
    (20, 0.95, 0.2, (20, 60)),
    (20, 0.95, 0.1, (50, 150)),
    (30, 0.95, 0.2, (50, 150)),
    (12, 0.95, 0.2, (50, 150)),
]
EIGHT_LARGE = [
    (8, 0.95, 0.1, (50, 150)),
    (8, 0.95, 0.2, (20, 60)),
    (8, 0.95, 0.2, (50, 150)),
    (8, 0.98, 0.2, (50, 150)),
    (6, 0.95, 0.2, (50, 150)),
]
USUAL = [(120, 0.5, 0.33, (1, 7)), (400, 0.8, 0.1, (1, 4)), (20, 0.9, 0.2, (1, 7))]
# clusters, sizes, shares of answers lost and won, correlation
FLIPS = [
    (200, (1, 1), 0.01, 0.0, 0.0),
    (200, (1, 1), 0.01, 0.005, 0.0),
    (100, (1, 7), 0.02, 0.01, 0.1),
    (5, (20, 60), 0.02, 0.01, 0.1),
    (5, (20, 60), 0.3, 0.05, 0.2),
    (20, (1, 7), 0.05, 0.02, 0.1),
    (120, (1, 7), 0.1, 0.05, 0.1),
]


def drawn(rng: np.random.Generator, count: np.ndarray, share: float, correlation: float) -> np.ndarray:
    """Right answers of clusters with ``count`` questions, their chances of a beta law around ``share``."""
    if share == 0:
        return np.zeros(count.shape)
    chance: float | np.ndarray = share
    if correlation:
        scale = (1 - correlation) / correlation
        chance = rng.beta(share * scale, (1 - share) * scale, count.shape)
    return rng.binomial(count, chance).astype(float)


def interval(right: np.ndarray, count: np.ndarray) -> tuple[float, float]:
    """Of one benchmark, with the variance as ``estimates.accuracy`` has it."""
    mean = right.sum() / count.sum()
    variance = variance_of_means(right[:, None], count, np.array([mean * (1 - mean)]))
    return share_interval(float(mean), float(variance[0]), len(count), 0.95)


def share_coverage(case: tuple[int, float, float, Sizes], runs: int) -> float:
    clusters, share, correlation, sizes = case
    rng, hits = np.random.default_rng(0), 0
    for _ in range(runs):
        count = rng.integers(sizes[0], sizes[1] + 1, clusters)
        low, high = interval(drawn(rng, count, share, correlation), count)
        hits += low <= share <= high
    return hits / runs


def flip_coverage(case: tuple[int, Sizes, float, float, float], runs: int) -> float:
    clusters, sizes, lost, won, correlation = case
    rng, hits = np.random.default_rng(1), 0
    for _ in range(runs):
        count = rng.integers(sizes[0], sizes[1] + 1, clusters)
        losses = drawn(rng, count, lost, correlation)
        # what was not lost may be won, so the truth is a little less than won - lost
        gains = drawn(rng, (count - losses).astype(int), won, correlation)
        (low, high), _ = difference_interval(gains - losses, count.astype(float), 0.95)
        hits += low <= won * (1 - lost) - lost <= high
    return hits / runs


@pytest.mark.parametrize("case", [NEAR_THE_EDGE[1], FIVE[2], EIGHT_LARGE[2], TWENTY_LARGE[0]], ids=str)
def test_intervals_of_accuracies_cover(case: tuple[int, float, float, Sizes]) -> None:
    assert share_coverage(case, 600) >= 0.93


@pytest.mark.parametrize("case", [FLIPS[0], FLIPS[4]], ids=str)
def test_intervals_of_differences_cover(case: tuple[int, Sizes, float, float, float]) -> None:
    assert flip_coverage(case, 600) >= 0.92


@pytest.mark.slow
@pytest.mark.parametrize("case", [*NEAR_THE_EDGE, *FIVE, *EIGHT_LARGE, *TWENTY_LARGE, *USUAL], ids=str)
def test_intervals_of_accuracies_cover_in_all_cases(case: tuple[int, float, float, Sizes]) -> None:
    assert share_coverage(case, 4000) >= 0.93


@pytest.mark.slow
@pytest.mark.parametrize("case", FLIPS, ids=str)
def test_intervals_of_differences_cover_in_all_cases(case: tuple[int, Sizes, float, float, float]) -> None:
    assert flip_coverage(case, 4000) >= 0.93


@pytest.mark.slow
@pytest.mark.parametrize("case", [FIVE[1], FIVE[2], NEAR_THE_EDGE[1]], ids=str)
def test_a_percentile_bootstrap_does_not(case: tuple[int, float, float, Sizes]) -> None:
    """What these intervals replace, so that the cases above are hard ones."""
    clusters, share, correlation, sizes = case
    rng, hits = np.random.default_rng(2), 0
    for _ in range(600):
        count = rng.integers(sizes[0], sizes[1] + 1, clusters)
        right = drawn(rng, count, share, correlation)
        weights = rng.multinomial(clusters, [1 / clusters] * clusters, 500)
        low, high = np.quantile((weights @ right) / (weights @ count), [0.025, 0.975])
        hits += low <= share <= high
    assert hits / 600 < 0.92


def test_they_are_no_wider_than_need_be_where_all_is_well() -> None:
    """Of 2000 independent answers, half of them right: within a hundredth of the normal one."""
    low, high = share_interval(0.5, 0.25 / 2000, 2000, 0.95)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 2000), rel=0.03)
    gaps = np.repeat([1.0, -1.0, 0.0], [100, 200, 1700])
    (low, high), error = difference_interval(gaps, np.ones(2000), 0.95)
    assert error == pytest.approx(gaps.std() / math.sqrt(2000), rel=0.02) and low < -0.05 < high


def test_what_is_usual_is_forgotten_where_there_are_clusters_enough() -> None:
    """Of 2000 clusters the variance is what they show; of eight equal ones it is not nothing."""
    rng = np.random.default_rng(3)
    count, chance = np.full(2000, 4), rng.beta(1, 1, 2000)
    right = rng.binomial(count, chance).astype(float)[:, None]
    mean = right.sum() / count.sum()
    shown = (right - mean * count[:, None]).var() / (4**2 * 2000)
    found = variance_of_means(right, count, np.array([mean * (1 - mean)]))
    assert found[0] == pytest.approx(shown, rel=0.01)
    equal = variance_of_means(np.full((8, 1), 95.0), np.full(8, 100), np.array([0.95 * 0.05]))
    assert 4 * 0.95 * 0.05 / 800 < equal[0] < 0.2 * 0.95 * 0.05 / 8


def test_what_is_usual_counts_as_degrees_of_freedom() -> None:
    """Else the intervals of five clusters are a quarter wider, and hold the truth in 99 % of the cases."""
    widths = []
    for seed in range(60):
        rng = np.random.default_rng([4, seed])
        count = rng.integers(20, 61, 5)
        low, high = interval(drawn(rng, count, 0.7, 0.2), count)
        widths.append(high - low)
    assert 0.4 < np.mean(widths) < 0.5


def test_what_cannot_be_known_is_not_claimed() -> None:
    assert share_interval(0.5, 0.0, 1, 0.95) == (0, 1)  # one set of pictures
    assert difference_interval(np.array([3.0]), np.array([9.0]), 0.95)[0] == (-1, 1)
    low, high = share_interval(0.5, 0.0, 5, 0.95)  # five clusters that happen to be equal
    assert low < 0.25 and high > 0.75
    (low, high), _ = difference_interval(np.zeros(200), np.ones(200), 0.95)
    assert high == -low == pytest.approx(1.97 * math.sqrt(2) / 204, rel=0.01)  # no flip among 200
    assert difference_interval(np.ones(9), np.ones(9), 0.95)[0][1] == 1  # never beyond what is possible


def test_quantiles_against_scipy() -> None:
    stats = pytest.importorskip(
        "scipy.stats", reason="scipy is not installed, it comes with the extra [test]"
    )
    for freedom in (1, 2, 4, 9, 30, 400, 20_000):
        for level in (0.5, 0.9, 0.95, 0.99):
            assert t_quantile(level, freedom) == pytest.approx(
                stats.t.ppf((1 + level) / 2, freedom), rel=1e-5
            )
    for a, b in ((0.5, 1.5), (1.0, 20.0), (3.7, 2.2), (196.0, 5.0), (9000.0, 180.5)):
        for share in (0.025, 0.5, 0.975):
            assert beta_quantile(share, a, b) == pytest.approx(
                stats.beta.ppf(share, a, b), rel=2e-4, abs=1e-7
            )
    exact = stats.binomtest(196, 200).proportion_ci(method="exact")
    # clusters of one question are worth as many answers, but for Student's law in place of the normal one
    found = share_interval(0.98, 0.98 * 0.02 / 200, 200, 0.95)
    assert found == pytest.approx((exact.low, exact.high), abs=1e-3)
