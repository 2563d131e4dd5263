# SPDX-License-Identifier: Apache-2.0
"""Statistics of answers: all specs answered the same questions, which come in clusters (images).

Intervals are over clusters, see ``intervals``; those of differences are paired, question by question.
p-values come from a randomisation test that swaps two specs on whole clusters; Holm's method corrects them
for their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ...errors import EvaluationError, did_you_mean
from ..answer.record import Record
from ..tasks.sample import normalise
from .intervals import Interval, difference_interval, share_interval, variance_of_means

RESAMPLES = 10_000
LEVEL = 0.95
RIGHT = 0.5  # a score from here on counts as a right answer where answers are counted
_ENTRIES_AT_ONCE = 4_000_000


@dataclass(frozen=True, eq=False)
class Table:
    """Scores (n, S) of n questions under S specs.

    Args:
        specs: names of the columns. ids, clusters, families, groups: (n,) of the questions.
        answers: per spec the n normalised answers; merged columns have none.
    """

    specs: tuple[str, ...]
    ids: np.ndarray
    clusters: np.ndarray
    families: np.ndarray
    groups: np.ndarray
    scores: np.ndarray
    answers: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, records: Iterable[Record]) -> Table:
        """From records in any order; every spec must have answered every question once."""
        rows: dict[str, dict[str, Record]] = {}
        for record in records:
            mine = rows.setdefault(record.spec, {})
            if record.id in mine:
                raise EvaluationError(
                    f"{record.spec} answered {record.id!r} twice; expected one record per spec and question"
                )
            mine[record.id] = record
        if not rows:
            raise EvaluationError("there are no records to compare; run evaluate first")
        first_spec, first = next(iter(rows.items()))
        for spec, mine in rows.items():
            # in either direction: the first spec may lack a question as well
            lacking = [one for one in first if one not in mine] or [one for one in mine if one not in first]
            if lacking:
                sizes = f"{len(mine)} questions, {first_spec} {len(first)}; they differ in {lacking[0]!r}"
                raise EvaluationError(f"{spec} answered {sizes}: compare specs on the same questions")
        sample = list(first.values())
        of = {
            name: np.array([getattr(one, name) for one in sample])
            for name in ("id", "cluster", "family", "group")
        }
        scores = np.array([[mine[key].score for mine in rows.values()] for key in first])  # (n, S)
        if not np.isfinite(scores).all():
            raise EvaluationError(
                f"{int((~np.isfinite(scores)).sum())} scores are not finite; expected 0 to 1"
            )
        answers = {
            spec: np.array([normalise(mine[key].answer) for key in first]) for spec, mine in rows.items()
        }
        return cls(tuple(rows), of["id"], of["cluster"], of["family"], of["group"], scores, answers)

    def __len__(self) -> int:
        return len(self.ids)

    def column(self, spec: str) -> int:
        """Number of a spec's column."""
        if spec not in self.specs:
            raise EvaluationError(
                f"{spec!r} was not evaluated; known are {list(self.specs)}.{did_you_mean(spec, self.specs)}"
            )
        return self.specs.index(spec)

    def of_spec(self, spec: str) -> np.ndarray:
        """(n,) scores of a spec."""
        return self.scores[:, self.column(spec)]

    def where(self, chosen: np.ndarray) -> Table:
        """The questions that a mask (n,) chooses."""
        if not chosen.any():
            raise EvaluationError(f"none of {len(self)} questions is left; expected a choice of at least one")
        rows = {
            name: getattr(self, name)[chosen] for name in ("ids", "clusters", "families", "groups", "scores")
        }
        return replace(self, answers={spec: texts[chosen] for spec, texts in self.answers.items()}, **rows)

    def merged(self, name: str, specs: Sequence[str]) -> Table:
        """With one more column, the mean of others, such as seeds."""
        if name in self.specs:
            raise EvaluationError(
                f"a column {name!r} is there already; choose another name for the mean of {list(specs)}"
            )
        mean = np.mean([self.of_spec(spec) for spec in specs], axis=0)
        return replace(self, specs=(*self.specs, name), scores=np.column_stack([self.scores, mean]))

    @cached_property
    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Per cluster: (C, S) sums of scores and (C,) questions.

        Clusters are numbered as they appear. Numbered by their names, the same answers would be drawn
        differently, and get other p-values, under a task that names its pictures differently.
        """
        # unique sorts by name; the rank of the first appearance numbers anew
        _, first, sorted_codes = np.unique(self.clusters, return_index=True, return_inverse=True)
        codes = np.argsort(np.argsort(first))[sorted_codes]
        count = np.bincount(codes).astype(float)
        return np.stack([np.bincount(codes, weights=column) for column in self.scores.T], axis=1), count


@dataclass(frozen=True)
class Estimate:
    """A value with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A paired difference of accuracies.

    Args:
        ci: its interval.
        p: of no difference. p_holm: corrected for the number of comparisons.
        mdd: the smallest difference that such an experiment would have found.
    """

    difference: float
    ci: Interval
    p: float
    p_holm: float
    mdd: float


@dataclass(frozen=True)
class Flips:
    """Questions that a reference got right and a spec did not (``lost``), and the reverse (``won``)."""

    lost: int
    won: int


def accuracy(table: Table, level: float = LEVEL) -> dict[str, Estimate]:
    """Mean score of every spec."""
    _check_level(level)
    sums, count = table.sums
    means, variance = table.scores.mean(axis=0), variance_of_means(sums, count, table.scores.var(axis=0))
    found = {}
    for spec, mean, its in zip(table.specs, means.tolist(), variance.tolist(), strict=True):
        found[spec] = Estimate(mean, *share_interval(mean, its, len(count), level))
    return found


def differences(
    table: Table,
    reference: str,
    specs: Sequence[str] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> dict[str, Difference]:
    """Paired differences of ``specs`` (default: all others) to the reference; Holm counts just these.

    Args:
        resamples, seed: of the randomisation test.
    """
    _check_level(level)
    specs = [spec for spec in table.specs if spec != reference] if specs is None else list(specs)
    if not specs:
        return {}
    columns, at = [table.column(spec) for spec in specs], table.column(reference)
    sums, count = table.sums
    gaps = sums[:, columns] - sums[:, [at]]  # (C, s)
    values, p = gaps.sum(axis=0) / count.sum(), swap_test(gaps, resamples, seed)
    corrected = holm(p)
    found = {}
    for i, spec in enumerate(specs):
        ci, error = difference_interval(gaps[:, i], count, level)
        found[spec] = Difference(float(values[i]), ci, float(p[i]), float(corrected[i]), detectable(error))
    return found


def swap_test(gaps: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """(s,) two-sided p-values of summed differences (C, s): share of random signs with as large a sum."""
    seen = np.abs(gaps.sum(axis=0))

    # -1 swaps the two specs on a whole cluster; (rows, s)
    def signs(rng: np.random.Generator, rows: int) -> np.ndarray:
        return np.abs(rng.choice(np.array([-1.0, 1.0]), size=(rows, len(gaps))) @ gaps)

    # a hair of slack, since equal sums are added in another order
    larger = (_in_chunks(len(gaps), resamples, seed, signs) >= seen - 1e-9).sum(axis=0)
    return (larger + 1) / (resamples + 1)  # the sum that was seen is one of the draws, so p is never 0


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down correction of p-values."""
    # the smallest p is multiplied by the number of tests, the next one by one less, and so on
    p = np.asarray(p, dtype=float)
    order = np.argsort(p)
    # a larger p never gets a smaller corrected one
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected


def detectable(error: float, alpha_z: float = 1.959964, power_z: float = 0.841621) -> float:
    """Minimum detectable difference: found with 80 % power at the 5 % level, given its standard error."""
    # quantiles of the normal law: 97.5 % and 80 %
    return (alpha_z + power_z) * error


def flips(table: Table, spec: str, reference: str) -> Flips:
    """Right answers that a spec lost and won against a reference."""
    mine, theirs = table.of_spec(spec) >= RIGHT, table.of_spec(reference) >= RIGHT
    return Flips(lost=int((theirs & ~mine).sum()), won=int((mine & ~theirs).sum()))


def agreement(table: Table, spec: str, reference: str) -> float | None:
    """Share of questions with the same normalised answer, right or wrong; None for merged columns."""
    if spec not in table.answers or reference not in table.answers:
        return None
    return float((table.answers[spec] == table.answers[reference]).mean())


def by(table: Table, key: str, spec: str) -> dict[str, float]:
    """Mean score per ``"families"`` or ``"groups"``, in order of appearance."""
    labels, scores = getattr(table, key), table.of_spec(spec)
    return {str(label): float(scores[labels == label].mean()) for label in dict.fromkeys(labels.tolist())}


def hard(table: Table, pooled: str) -> Table | None:
    """The questions that a pooling spec gets wrong; None where there are none."""
    wrong = table.of_spec(pooled) < RIGHT
    return table.where(wrong) if wrong.any() else None


def headline(
    table: Table, blind: Mapping[str, float], reference: str, margin: float = 0.2
) -> tuple[list[str], dict[str, str]]:
    """Families that the unpruned model has learnt, and why the others stay out of the headline average."""
    inside, outside = [], {}
    for family, value in by(table, "families", reference).items():
        if family not in blind:
            raise EvaluationError(f"family {family!r} has no blind score; the task knows {sorted(blind)}")
        if value >= blind[family] + margin:
            inside.append(family)
        else:
            outside[family] = (
                f"{reference} scores {value:.3f}, a guesser {blind[family]:.3f}: less than {margin:.2f} above"
            )
    return inside, outside


def _in_chunks(
    width: int, resamples: int, seed: int, make: Callable[[np.random.Generator, int], np.ndarray]
) -> np.ndarray:
    if not isinstance(resamples, int) or resamples < 100:
        raise EvaluationError(f"resamples={resamples!r}; expected an int >= 100")
    # all draws at once would take too much memory where clusters are many
    rng, step = np.random.default_rng(seed), max(1, _ENTRIES_AT_ONCE // width)
    return np.concatenate([make(rng, min(step, resamples - start)) for start in range(0, resamples, step)])


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise EvaluationError(f"level={level!r}; expected a share between 0 and 1, such as 0.95")
