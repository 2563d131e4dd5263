# SPDX-License-Identifier: Apache-2.0
"""Mistakes in how answers are asked for, kept, counted and reported."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import mutant_targets as at
import numpy as np
from mutant import Mutant, Pytest

Function = Callable[..., Any]


def of(name: str, test: str = "") -> Pytest:
    return Pytest(f"tests/evaluation/test_{name}.py{'::' * bool(test)}{test}")


# statistics -----------------------------------------------------------------------------------------


def p_may_be_zero(swap_test: Function) -> Function:
    """The observed sum does not count among the random ones."""

    def changed(gaps: Any, resamples: int, seed: int = 0) -> Any:
        return (swap_test(gaps, resamples, seed) * (resamples + 1) - 1) / resamples

    return changed


def few_clusters_are_many(t_quantile: Function) -> Function:
    return lambda level, freedom: t_quantile(level, 10_000)


def no_flip_is_proof(difference_interval: Function) -> Function:
    """The interval of the differences that were seen alone, without made-up questions."""

    def changed(sums: Any, count: Any, level: float) -> Any:
        clusters, centre = len(count), sums.sum() / count.sum()
        error = np.sqrt(((sums - centre * count) ** 2).sum() * clusters / max(1, clusters - 1)) / count.sum()
        return (centre - 1.97 * error, centre + 1.97 * error), error

    return changed


def the_first_source(retained: Function) -> Function:
    def changed(self: Any, method: str, share: float) -> Any:
        found = retained(self, method, share)
        return found and replace(found, by_source=dict(list(found.by_source.items())[:1]))

    return changed


def corrected_per_budget(against_random: Function) -> Function:
    def changed(table: Any, specs: Any, resamples: int, seed: int) -> Any:
        from vlmprune.evaluation.stats.estimates import holm
        from vlmprune.evaluation.stats.summary import budget_of

        groups: dict[Any, dict[str, Any]] = defaultdict(dict)
        for spec, one in against_random(table, specs, resamples, seed).items():
            groups[budget_of(spec)][spec] = one
        found: dict[str, Any] = {}
        for group in groups.values():
            corrected = holm(np.array([one.p for one in group.values()]))
            found |= {
                spec: replace(one, p_holm=float(p))
                for (spec, one), p in zip(group.items(), corrected, strict=True)
            }
        return found

    return changed


def lost_for_won(flips: Function) -> Function:
    return lambda table, spec, reference: flips(table, reference, spec)


def what_pooling_gets_right(hard: Function) -> Function:
    return lambda table, pooled: table.where(table.of_spec(pooled) >= 0.5)


def any_margin(headline: Function) -> Function:
    return lambda table, blind, reference, margin=0.2: headline(table, blind, reference, 0.0)


def least_accurate(worst: Function) -> Function:
    def changed(table: Any, spec: str) -> Any:
        from vlmprune.evaluation.stats.estimates import by

        mine = by(table, "families", spec)
        family = min(mine, key=mine.get)
        return replace(worst(table, spec), family=family, accuracy=mine[family])

    return changed


def interval_alone(side: Function) -> Function:
    return lambda against: side(replace(against, p_holm=0.0))


STATISTICS = (
    Mutant("p may be zero", at.SWAP_TEST, p_may_be_zero, of("stats")),
    Mutant("five clusters taken for many", at.T_QUANTILE, few_clusters_are_many, of("intervals")),
    Mutant("no flip taken for proof", at.DIFFERENCE_INTERVAL, no_flip_is_proof, of("intervals")),
    Mutant(
        "one source stands for all",
        at.RETAINED,
        the_first_source,
        of("agreement", "test_what_is_published_of_a_method_at_a_budget"),
    ),
    Mutant("close pairs taken for clear ones", at.CLEAR, lambda clear: 0.0, of("agreement")),
    Mutant("Holm per budget only", at.AGAINST_RANDOM, corrected_per_budget, of("stats")),
    Mutant(
        "lost and won swapped",
        at.FLIPS,
        lost_for_won,
        of("stats", "test_flips_agreement_and_the_hard_slice_by_hand"),
    ),
    Mutant(
        "hard is what pooling gets right",
        at.HARD,
        what_pooling_gets_right,
        of("stats", "test_flips_agreement_and_the_hard_slice_by_hand"),
    ),
    Mutant("families in the headline without a margin", at.HEADLINE, any_margin, of("stats")),
    Mutant("the worst family by accuracy alone", at.WORST, least_accurate, of("worst_family")),
    Mutant(
        "a verdict without its correction",
        at.SIDE,
        interval_alone,
        of("report_tables", "test_a_difference_counts_only_beyond_its_interval_and_its_correction"),
    ),
)


# answers --------------------------------------------------------------------------------------------


def answers_of_other_rows(generate: Function) -> Function:
    def changed(*args: Any, **options: Any) -> Any:
        made = generate(*args, **options)
        return made._replace(ids=made.ids.flip(0))

    return changed


def images_of_other_rows(take: Function) -> Function:
    return lambda self, batch: take(self, batch)[::-1]


def case_counts(normalise: Function) -> Function:
    def changed(answer: str, *, compact: bool = False) -> str:
        found = normalise(answer, compact=compact)
        return found.upper() if answer[:1].isupper() else found

    return changed


def mask_on_its_side(covered: Function) -> Function:
    return lambda mask, boxes, view: covered(mask.T, boxes, view)


ANSWERS = (
    Mutant("answers of other rows", at.GENERATE, answers_of_other_rows, of("evaluate")),
    Mutant("images of other rows", at.TAKE, images_of_other_rows, of("evaluate")),
    Mutant(
        "capitals count in answers", at.NORMALISE, case_counts, of("shapes", "test_answers_are_normalised")
    ),
    Mutant("object masks on their side", at.COVERED, mask_on_its_side, of("curves")),
)


# runs -----------------------------------------------------------------------------------------------


def no_fsync(write: Function) -> Function:
    return lambda file, data: file.write(data)


def lines_doubled(append: Function) -> Function:
    """Samples that are in the journal already are written again."""

    def changed(self: Any, lines: Any) -> int:
        from vlmprune.evaluation.leaderboard.rundir import encode_line

        lines = list(lines)
        again = [line for line in lines if line["id"] in self.ids]
        with self.path.open("ab") as file:
            file.write(b"".join(encode_line(self.cell, line) for line in again))
        return append(self, lines)

    return changed


def clusters_split(shards: Function) -> Function:
    return lambda samples, size: [
        list(samples[start : start + size]) for start in range(0, len(samples), size)
    ]


def nothing_wrong(problems: Function) -> Function:
    def changed(*args: Any) -> Iterator[str]:
        return iter(())

    return changed


def warm_up_counted(race: Function) -> Function:
    def changed(entries: Any, rounds: int, *, warmup: int = 2, **options: Any) -> Any:
        found = race(entries, rounds + warmup, warmup=0, **options)
        return {name: seconds[:rounds] for name, seconds in found.items()}

    return changed


def names_only(digest: Function) -> Function:
    """Files are told apart by their names, whatever they hold."""

    def changed(files: Any, root: Any) -> str:
        return hashlib.sha256("".join(str(file.relative_to(root)) for file in files).encode()).hexdigest()[
            :16
        ]

    return changed


RUNS = (
    Mutant("no fsync", at.WRITE, no_fsync, of("sweep_journal")),
    Mutant("a torn line stays", at.MEND, lambda mend: lambda self: self.path.touch(), of("sweep_journal")),
    Mutant("weights told apart by names", at.DIGEST, names_only, of("sweep_identity")),
    Mutant("a card makes other weights", at.TOLD, lambda told: (), of("sweep_identity")),
    Mutant("answered samples written again", at.APPEND, lines_doubled, of("sweep")),
    Mutant(
        "plug-in code left out of the recipe",
        at.PLUGINS,
        lambda plugins: lambda specs: (),
        of("sweep_plugins"),
    ),
    Mutant("clusters split between shards", at.SHARDS, clusters_split, of("sweep")),
    Mutant("rows without proof reported", at.UNBELIEVABLE, nothing_wrong, of("report")),
    Mutant("stale rows reported", at.STALE, nothing_wrong, of("report")),
    Mutant("unlike rows compared", at.INCOMPARABLE, nothing_wrong, of("report")),
    Mutant("the warm-up timed", at.RACE, warm_up_counted, of("warm_up")),
)

MUTANTS = (*STATISTICS, *ANSWERS, *RUNS)
