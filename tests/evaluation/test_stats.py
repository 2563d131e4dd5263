# SPDX-License-Identifier: Apache-2.0
"""Statistics: intervals cover what they promise, differences are paired, and wrong tables are refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.errors import EvaluationError
from vlmprune.evaluation.answer.record import Record
from vlmprune.evaluation.stats import estimates
from vlmprune.evaluation.stats.estimates import Table
from vlmprune.evaluation.stats.summary import Band, Headline, Worst, summarise


def record(
    spec: str, number: int, score: float, cluster: str = "", answer: str = "yes", **given: object
) -> Record:
    values = {
        "family": "exist",
        "group": "general",
        "dense_tokens": 144,
        "realised_tokens": 36,
        "layer_tokens": 36.0,
    }
    values |= {
        "firings": 3,
        "on_object": None,
        "positions": "compact",
        "encoding": "shared",
        "seconds": {"total": 0.1},
    }
    return Record(
        spec=spec,
        id=f"q{number}",
        cluster=cluster or f"c{number}",
        answer=answer,
        score=score,
        **(values | given),
    )


def table(scores: np.ndarray, clusters: np.ndarray | None = None) -> Table:
    """Scores (n, S) as a table of specs a, b, c, ..."""
    labels = np.arange(len(scores)) if clusters is None else clusters
    cells = ((row, column) for row in range(len(scores)) for column in range(scores.shape[1]))
    return Table.of(record("abcdefgh"[j], i, float(scores[i, j]), f"c{labels[i]}") for i, j in cells)


def clustered(rng: np.random.Generator, clusters: int, specs: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Answers whose chance is shared by the questions of a cluster: uniform, so right half of the time."""
    codes = np.repeat(np.arange(clusters), rng.integers(1, 8, clusters))
    chance = rng.random(clusters)[codes]
    return (rng.random((len(codes), specs)) < chance[:, None]).astype(float), codes


# --- intervals ------------------------------------------------------------------------------------


def test_intervals_over_clusters_cover_the_truth_as_often_as_they_say() -> None:
    """500 benchmarks of 120 images; nominal 95 %, tolerated 92 to 97.5 %; too short over questions."""
    rng, runs, truth = np.random.default_rng(0), 500, 0.5
    hits, naive = 0, 0
    for _ in range(runs):
        scores, codes = clustered(rng, 120)
        inside = estimates.accuracy(table(scores, codes))["a"]
        hits += inside.low <= truth <= inside.high
        half = 1.96 * np.sqrt(scores.mean() * (1 - scores.mean()) / len(scores))
        naive += abs(scores.mean() - truth) <= half
    assert 0.92 <= hits / runs <= 0.975
    assert naive / runs < 0.9


def test_paired_intervals_cover_a_difference_and_are_shorter_than_unpaired_ones() -> None:
    rng, runs, hits, shorter = np.random.default_rng(1), 300, 0, 0
    for seed in range(runs):
        scores, codes = clustered(rng, 100)
        worse = np.where(
            rng.random(len(scores)) < 0.1, 0.0, scores[:, 0]
        )  # loses a tenth of what was right: 5 points
        both = table(np.column_stack([scores, worse]), codes)
        gap = estimates.differences(both, "a", resamples=400, seed=seed)["b"]
        hits += gap.ci[0] <= -0.05 <= gap.ci[1]
        alone = estimates.accuracy(both)["b"]
        shorter += gap.ci[1] - gap.ci[0] < alone.high - alone.low
    assert 0.92 <= hits / runs <= 0.98
    assert shorter == runs


def test_p_values_are_small_as_often_as_they_say() -> None:
    """Two specs with the same chances: p below 5 % in about 5 % of 400 benchmarks."""
    rng = np.random.default_rng(2)
    found = []
    for seed in range(400):
        scores, codes = clustered(rng, 60, specs=2)
        found.append(estimates.differences(table(scores, codes), "a", resamples=400, seed=seed)["b"].p)
    assert 0.02 <= np.mean(np.array(found) <= 0.05) <= 0.08


def test_the_detectable_difference_is_detected_four_times_out_of_five() -> None:
    rng = np.random.default_rng(3)
    found, runs = 0, 400
    for seed in range(runs):
        gaps = rng.choice([-1.0, 0.0, 1.0], size=200, p=[0.1, 0.8, 0.1])
        reach = estimates.detectable(np.sqrt(0.2 / 200))
        found += estimates.swap_test(gaps[:, None] + reach, 400, seed)[0] <= 0.05
    assert (
        0.7 <= found / runs <= 0.86
    )  # a swap test is a little weaker than the formula: its null contains the shift


@pytest.mark.parametrize(("score", "edge"), [(1.0, "high"), (0.0, "low")])
def test_all_right_or_all_wrong_is_not_certainty(score: float, edge: str) -> None:
    found = estimates.accuracy(table(np.full((20, 1), score)))["a"]
    assert found.value == score == getattr(found, edge)
    assert found.high - found.low == pytest.approx(1 - 0.025 ** (1 / 20))  # Clopper-Pearson


def test_an_interval_narrows_with_the_root_of_the_number_of_images_not_of_questions() -> None:
    rng = np.random.default_rng(4)
    few, many = ((rng.random((n, 1)) < 0.5).astype(float) for n in (100, 900))
    width = [e.high - e.low for e in (estimates.accuracy(table(x))["a"] for x in (few, many))]
    assert width[0] / width[1] == pytest.approx(3, rel=0.1)
    copied = estimates.accuracy(table(np.repeat(few, 9, axis=0), np.repeat(np.arange(100), 9)))["a"]
    assert copied.high - copied.low == pytest.approx(width[0], rel=0.1)


# --- tests and corrections ------------------------------------------------------------------------


def test_the_swap_test_is_the_exact_one_where_all_signs_can_be_tried() -> None:
    gaps = np.array([[1.0], [1.0], [0.0], [1.0], [-1.0], [1.0], [1.0], [2.0]])
    sums = [abs(np.dot(signs, gaps[:, 0])) for signs in product((-1, 1), repeat=len(gaps))]
    exact = np.mean(np.array(sums) >= abs(gaps.sum()) - 1e-9)
    assert estimates.swap_test(gaps, 20_000)[0] == pytest.approx(exact, abs=0.01)
    assert estimates.swap_test(np.zeros((9, 1)), 200)[0] == 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_holm_is_between_no_correction_and_bonferroni_and_keeps_the_order(p: list[float]) -> None:
    given_p, corrected = np.array(p), estimates.holm(np.array(p))
    assert (corrected >= given_p - 1e-12).all() and (
        corrected <= np.minimum(given_p * len(p), 1) + 1e-12
    ).all()
    assert (np.diff(corrected[np.argsort(given_p)]) >= -1e-12).all()


def test_holm_by_hand() -> None:
    assert estimates.holm(np.array([0.01, 0.04, 0.03])).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert estimates.holm(np.array([])).size == 0


def test_a_clear_difference_is_found_and_none_is_not() -> None:
    rng = np.random.default_rng(6)
    base = (rng.random(600) < 0.8).astype(float)
    worse = np.where(rng.random(600) < 0.2, 0.0, base)
    found = estimates.differences(table(np.column_stack([base, worse, base])), "a")
    assert found["b"].ci[1] < 0 and found["b"].p_holm < 0.01 and found["b"].mdd < 0.1
    same = found["c"]  # no flip in 600 answers is no proof that there is none
    assert (same.difference, same.p) == (0, 1) and same.ci[1] == -same.ci[0] == pytest.approx(
        0.0046, abs=1e-4
    )


def test_a_p_value_is_never_zero() -> None:
    """The sum that was seen is one of the draws: (hits + 1) / (draws + 1), whatever else is drawn."""
    gaps = np.ones((60, 1))  # only one of 2**60 signs gives as large a sum
    assert estimates.swap_test(gaps, 1000).tolist() == [1 / 1001]
    base = table(np.column_stack([np.ones(60), np.zeros(60)]))
    found = estimates.differences(base, "a", resamples=500)["b"]
    assert found.p == found.p_holm == 1 / 501


def test_draws_do_not_depend_on_how_clusters_are_called() -> None:
    """The same answers get the same p-values under another name of the task and of its pictures."""
    scores, codes = clustered(np.random.default_rng(8), 40, specs=3)
    plain = table(scores, codes)
    renamed = replace(plain, clusters=np.array([f"z{99 - code:02}" for code in codes]))  # in the other order
    assert sorted(set(renamed.clusters)) != sorted(set(renamed.clusters), key=list(renamed.clusters).index)
    gaps = [estimates.differences(one, "a", resamples=300) for one in (plain, renamed)]
    assert gaps[0] == gaps[1]
    assert estimates.accuracy(plain) == estimates.accuracy(renamed)


# --- counts ---------------------------------------------------------------------------------------


def test_flips_agreement_and_the_hard_slice_by_hand() -> None:
    answers = {"dense": ["yes", "No.", "red", "two"], "pool@36": ["yes", "yes", "blue", "2"]}
    answers["uniform@36"] = ["no", "no", "red", "3"]
    mark = {"dense": [1, 1, 1, 1], "pool@36": [1, 0, 0, 1], "uniform@36": [0, 1, 1, 0]}
    rows = [
        record(spec, i, float(mark[spec][i]), answer=text)
        for spec, texts in answers.items()
        for i, text in enumerate(texts)
    ]
    made = Table.of(rows)
    assert estimates.flips(made, "uniform@36", "dense") == estimates.Flips(lost=2, won=0)
    assert estimates.flips(made, "uniform@36", "pool@36") == estimates.Flips(lost=2, won=2)
    assert estimates.agreement(made, "pool@36", "dense") == 0.5  # "two" and "2" are one answer
    assert estimates.hard(made, "pool@36").ids.tolist() == ["q1", "q2"]
    assert estimates.hard(made, "dense") is None


def test_families_below_their_margin_stay_out_and_are_named() -> None:
    rows = [record("dense", i, float(i % 10 < 9), family="attr") for i in range(50)]
    rows += [record("dense", 100 + i, float(i % 2), family="exist") for i in range(50)]
    inside, outside = estimates.headline(Table.of(rows), {"attr": 0.2, "exist": 0.5}, "dense")
    assert inside == ["attr"] and "0.500" in outside["exist"]
    with pytest.raises(EvaluationError, match="'attr' has no blind score"):
        estimates.headline(Table.of(rows), {"exist": 0.5}, "dense")


def test_tables_that_cannot_be_compared_are_refused() -> None:
    rows = [record("dense", i, 1.0) for i in range(3)]
    with pytest.raises(EvaluationError, match="no records"):
        Table.of([])
    with pytest.raises(EvaluationError, match="dense answered 'q0' twice"):
        Table.of([*rows, rows[0]])
    with pytest.raises(
        EvaluationError, match=r"uniform@9 answered 1 questions, dense 3; they differ in 'q0'"
    ):
        Table.of([*rows, record("uniform@9", 1, 1.0)])
    with pytest.raises(EvaluationError, match="1 scores are not finite"):
        Table.of([*rows, record("dense", 9, float("nan"))])
    with pytest.raises(EvaluationError, match=r"'dens' was not evaluated.*Did you mean 'dense'\?"):
        estimates.differences(Table.of(rows), "dens")
    with pytest.raises(EvaluationError, match="level=95"):
        estimates.accuracy(Table.of(rows), level=95)
    two = Table.of([*rows, *(record("uniform@9", i, 1.0) for i in range(3))])
    for wrong in ({"resamples": 10}, {"level": 95}):
        with pytest.raises(EvaluationError, match=next(iter(wrong))):
            estimates.differences(two, "dense", **wrong)


# --- the summary ----------------------------------------------------------------------------------


def leaderboard() -> list[Record]:
    """Dense 0.9; good@36 loses little, pooling all of the text, random a lot, differently for each seed."""
    rng = np.random.default_rng(7)
    rows = []
    for i in range(400):
        text = i % 4 == 0
        kind = {"family": "text" if text else "attr", "group": "text" if text else "general"}
        base = float(rng.random() < 0.9)
        loss = {
            "fastervlm@36": 0.05,
            "pool@36": 1.0 if text else 0.02,
            "random(seed=0)@36": 0.4,
            "random(seed=1)@36": 0.5,
            "random(seed=2)@36": 0.3,
        }
        rows.append(record("dense", i, base, answer=f"a{i}", realised_tokens=144, layer_tokens=144.0, **kind))
        rows += [
            record(spec, i, base * float(rng.random() >= share), answer=f"{spec[0]}{i}", **kind)
            for spec, share in loss.items()
        ]
    return rows


def test_the_summary_tells_what_belongs_beside_an_accuracy() -> None:
    pictures = {f"q{i}": 1 + i % 2 for i in range(400)}
    found = summarise(
        leaderboard(), {"text": 0.0, "attr": 0.2}, model="m", task="t", pictures=pictures, resamples=1000
    )
    rows = {row.spec: row for row in found.rows}
    assert found.headline == Headline(
        "m", "t", ("text", "attr"), {}, {"text": 0.0, "attr": 0.2}, pytest.approx(0.15)
    )
    assert list(rows) == [
        "dense",
        "fastervlm@36",
        "pool@36",
        *(f"random(seed={s})@36" for s in range(3)),
        "random@36",
    ]
    dense, good, pool, random = (rows[name] for name in ("dense", "fastervlm@36", "pool@36", "random@36"))
    assert dense.vs_dense is None and dense.retained == 1 and dense.keep is None and dense.band is None
    assert good.vs_random.difference == pytest.approx(good.accuracy - random.accuracy)
    assert good.vs_random.p_holm < 0.01 and good.vs_dense.ci[0] < good.vs_dense.difference < 0
    assert good.ci[0] < good.accuracy < good.ci[1] and (good.n, good.realised_tokens) == (400, 36)
    assert (good.clusters, good.pictures, good.setting) == (400, 1.5, ("m", "t"))
    assert (good.answers, random.answers) == (400, 1200)
    assert pool.worst == Worst("text", 0, 0) and pool.hard is None
    assert good.hard.n >= 100 and pool.flips.won == 0 < pool.flips.lost
    seeds = [rows[f"random(seed={s})@36"].accuracy for s in range(3)]
    assert random.band == Band(tuple(f"random(seed={s})@36" for s in range(3)), min(seeds), max(seeds))
    assert random.accuracy == pytest.approx(np.mean(seeds))
    assert random.vs_random is None and random.vs_dense.p < 0.01
    assert rows["random(seed=1)@36"].vs_dense is None  # part of the band
    assert good.mdd == good.vs_dense.mdd > 0 and good.agreement == 0 and dense.agreement == 1
    assert good.groups.keys() == {"text", "general"} and good.method == "fastervlm" and good.keep == "36"


def test_p_values_are_corrected_over_all_rows_of_a_table_whatever_their_budget() -> None:
    rng, rows = np.random.default_rng(9), []
    specs = [f"{name}@{keep}" for keep in (36, 18, 9) for name in ("fastervlm", "holov")]
    specs += [f"random(seed={seed})@{keep}" for keep in (36, 18, 9) for seed in (0, 1)]
    for i in range(120):
        rows.append(record("dense", i, 1.0))
        rows += [record(spec, i, float(rng.random() < 0.6 + 0.1 * (spec[0] != "r"))) for spec in specs]
    found = summarise(rows, {"exist": 0.5}, resamples=2000)
    tested = [row for row in found.rows if row.vs_random]
    assert len(tested) == 6 and len({row.keep for row in tested}) == 3
    by_hand = estimates.holm(np.array([row.vs_random.p for row in tested]))
    assert [row.vs_random.p_holm for row in tested] == pytest.approx(by_hand.tolist())
    smallest = min(tested, key=lambda row: row.vs_random.p)
    assert smallest.vs_random.p_holm == pytest.approx(
        6 * smallest.vs_random.p
    )  # and not 2 times, as per budget
    dense = [row for row in found.rows if row.vs_dense]
    assert len(dense) == 9  # six methods and three means of seeds
    by_hand = estimates.holm(np.array([row.vs_dense.p for row in dense]))
    assert [row.vs_dense.p_holm for row in dense] == pytest.approx(by_hand.tolist())


def test_a_spec_without_a_budget_is_compared_with_the_baselines_that_it_is_matched_with() -> None:
    rows = [replace(one, spec="sparsevlm") if one.spec == "fastervlm@36" else one for one in leaderboard()]
    blind = {"text": 0.0, "attr": 0.2}
    alone, matched = (
        {row.spec: row for row in summarise(rows, blind, matched=given, resamples=200).rows}["sparsevlm"]
        for given in (None, {"sparsevlm": "36"})
    )
    assert (alone.keep, alone.vs_random, alone.hard) == (None, None, None)
    assert matched.keep == "36" and matched.vs_random.difference > 0 and matched.hard.n > 0


def test_what_costs_more_than_its_budget_is_compared_with_random_tokens_that_cost_as_much() -> None:
    """fastv keeps 9 and reads 24 per layer, between 18 and 36 of random, which knows more there."""
    rng, rows = np.random.default_rng(10), []
    right = {"dense": 1.0, "fastv@9": 0.6, "fastervlm@9": 0.6, "fastv@36": 0.9}
    right |= {f"random(seed={s})@{k}": x for k, x in ((9, 0.4), (18, 0.6), (36, 0.8)) for s in (0, 1)}
    for i in range(300):
        luck = rng.random()
        for spec, share in right.items():
            kept = 144.0 if spec == "dense" else float(spec.partition("@")[2])
            read = {"fastv@9": 24.0, "fastv@36": 60.0}.get(spec, kept)
            given = {"realised_tokens": kept, "layer_tokens": read}
            rows.append(record(spec, i, float(luck < share), **given))
    found = {row.spec: row for row in summarise(rows, {"exist": 0.0}, resamples=500).rows}
    assert found["fastv@9"].vs_random.difference == pytest.approx(0.2, abs=0.05)
    place = np.log(24 / 18) / np.log(2)
    between = (1 - place) * found["random@18"].accuracy + place * found["random@36"].accuracy
    equal = found["fastv@9"].vs_random_equal
    assert equal.difference == pytest.approx(found["fastv@9"].accuracy - between)
    assert equal.ci[1] < 0 and equal.p <= equal.p_holm < 0.05
    place = np.log(60 / 36) / np.log(144 / 36)  # above the budgets of random stands the dense model
    between = (1 - place) * found["random@36"].accuracy + place
    assert found["fastv@36"].vs_random_equal.difference == pytest.approx(found["fastv@36"].accuracy - between)
    assert found["fastervlm@9"].vs_random_equal is None and found["random@9"].vs_random_equal is None
    assert found["fastv@9"].query_aware and not found["fastervlm@9"].query_aware


def test_a_model_that_has_learnt_nothing_is_summarised_over_all_families() -> None:
    found = summarise(leaderboard(), {"text": 0.9, "attr": 0.9}, resamples=200)
    assert found.headline.families == () and set(found.headline.excluded) == {"text", "attr"}
    assert {row.n for row in found.rows} == {400}


def test_families_that_are_not_learnt_are_shown_and_not_averaged() -> None:
    found = summarise(leaderboard(), {"text": 0.9, "attr": 0.2}, resamples=200)
    pool = next(row for row in found.rows if row.spec == "pool@36")
    assert (
        pool.n == 300 and pool.families["text"] == 0 and pool.worst.family == "attr" and pool.accuracy > 0.8
    )
    assert found.headline.chance == pytest.approx(0.2)  # of what counts


def test_a_summary_needs_the_dense_model_and_seeds_with_names() -> None:
    rows = leaderboard()
    with pytest.raises(EvaluationError, match="'dense' was not evaluated"):
        summarise([row for row in rows if row.spec != "dense"], {"text": 0.0, "attr": 0.2})
    plain = [
        record("random@36", i, 0.0, family=row.family, group=row.group) for i, row in enumerate(rows[::6])
    ]
    with pytest.raises(EvaluationError, match="write its seed as well"):
        summarise([*rows, *plain], {"text": 0.0, "attr": 0.2})
