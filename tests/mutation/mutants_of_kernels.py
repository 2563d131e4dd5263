# SPDX-License-Identifier: Apache-2.0
"""Mistakes in the kernels that run without Triton; those of the others are in mutants_of_triton.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mutant_targets as at
import numpy as np
import torch
from mutant import Mutant, Pytest

Function = Callable[..., Any]
SELECT = Pytest("tests/kernels/test_select.py")
GREEDY = Pytest("tests/kernels/test_greedy.py")
ALL_TOKENS = Pytest("tests/kernels/test_ops.py::test_a_budget_above_the_number_of_tokens_takes_them_all")


# selection ----------------------------------------------------------------------------------------


def right_one_of_equals(at_least: Function) -> Function:
    return lambda row, limit, k: len(row) - 1 - at_least(row[::-1], limit, k)[::-1]


def all_equals(at_least: Function) -> Function:
    return lambda row, limit, k: np.flatnonzero(row >= limit)


def nan_highest(ranking: Function) -> Function:
    return lambda scores, *k: ranking(torch.where(scores.isnan(), torch.inf, scores), *k)


def more_than_there_are(topk_select: Function) -> Function:
    def changed(scores: Any, k: int) -> Any:
        batch, n = scores.shape[-2:]
        return topk_select(scores, k) if k <= n else torch.arange(k, dtype=torch.int32).expand(batch, k)

    return changed


def negative_zero_lower(ranked: Function) -> Function:
    below = -torch.finfo(torch.float32).tiny
    return lambda scores: ranked(torch.where((scores == 0) & scores.signbit(), below, scores.float()))


def reference_right_one_of_equals(ranked: Function) -> Function:
    return lambda scores: scores.shape[-1] - 1 - ranked(scores.flip(-1))


SELECTION = (
    Mutant("the right one of equals", at.AT_LEAST, right_one_of_equals, SELECT),
    Mutant("ties ignored", at.AT_LEAST, all_equals, SELECT),
    Mutant("NaN above all", at.CPU_TOPK, nan_highest, SELECT),
    Mutant("budget not clamped on the CPU", at.CPU_TOPK, more_than_there_are, ALL_TOKENS),
    Mutant("two zeros", at.RANKED, negative_zero_lower, SELECT),
    Mutant("reference takes the right one of equals", at.RANKED, reference_right_one_of_equals, SELECT),
    Mutant("NaN above all in the reference", at.RANKED, nan_highest, SELECT),
    Mutant(
        "a forced backend forgotten",
        at.FORCED,
        lambda forced: lambda backend: forced(None),
        Pytest("tests/kernels/test_ops.py"),
    ),
)


# rows ---------------------------------------------------------------------------------------------


def shapes_not_clamped(kept: Function) -> Function:
    # torch holds the shape function of prune since it was registered; what it calls can still be changed
    return lambda k, n: k


def first_sample_only(numbered: Function) -> Function:
    return lambda idx, n: idx.long().flatten()


def last_one_wins(unprune: Function) -> Function:
    return lambda g, idx, n, ordered=False: unprune(g, idx, n, ordered=True)


def gradient_of_another_row(scatter: Function) -> Function:
    # torch holds the backward functions since they were registered: all of them place gradients by this one
    return lambda g, idx, n, options: scatter(g, idx.flip(0), n, options)


def always_promised(scatter: Function) -> Function:
    """Indices of a gather are taken for ascending and distinct when its gradient is placed."""
    return lambda g, idx, n, options: scatter(g, idx, n, {**options, "ordered": True})


ROWS = (
    Mutant("budget not clamped in shapes", at.FAKE_KEPT, shapes_not_clamped, ALL_TOKENS),
    Mutant("rows of the first sample", at.NUMBERED, first_sample_only, SELECT),
    Mutant("repeated rows overwrite", at.UNPRUNE, last_one_wins, SELECT),
    Mutant(
        "gradients placed by a promise",
        at.GRADIENT_SCATTER,
        always_promised,
        Pytest("tests/kernels/test_ops.py"),
    ),
    Mutant(
        "indices not looked at",
        at.INDICES_INSIDE,
        lambda inside: lambda idx, n: None,
        Pytest("tests/kernels/test_bad_input.py"),
    ),
    Mutant(
        "gradient of another row",
        at.GRADIENT_SCATTER,
        gradient_of_another_row,
        Pytest("tests/kernels/test_ops.py::test_gradients_that_are_not_contiguous"),
    ),
)


# greedy choice and scores -------------------------------------------------------------------------


def may_be_picked_again(best: Function) -> Function:
    """A picked token is worth its distance to itself, which is 0, in place of less than all others."""
    return lambda value, taken: best(np.where(taken, 0, value), np.zeros_like(taken))


def nearest_to_itself(nearest: Function) -> Function:
    return lambda matrix: matrix.max(axis=1)


def compared_one_way(nearest: Function) -> Function:
    """Tokens are compared with those of their own block and of later ones."""

    def changed(rows: Any) -> Any:
        block = nearest.__globals__["_BLOCK"]
        return np.concatenate([nearest(rows[start:])[:block] for start in range(0, len(rows), block)])

    return changed


def nan_first(best: Function) -> Function:
    def changed(value: Any, taken: Any) -> int:
        spoilt = np.flatnonzero(np.isnan(value) & ~taken)
        return int(spoilt[0]) if len(spoilt) else best(value, taken)

    return changed


def wrong_indices_pass(ordered: Function) -> Function:
    def changed(idx: Any, least: int, n: int, **options: Any) -> Any:
        ascending, trouble = ordered(idx, least, n, **options)
        return ascending, torch.zeros_like(trouble)

    return changed


CHOICES = (
    Mutant("wrong indices pass", at.ORDERED, wrong_indices_pass, Pytest("tests/core/test_select.py")),
    Mutant("a token picked twice", at.BEST, may_be_picked_again, GREEDY),
    Mutant("nearest to itself", at.NEAREST, nearest_to_itself, GREEDY),
    Mutant("blocks of pairs compared one way", at.NEAREST_OF_MANY, compared_one_way, GREEDY),
    Mutant("NaN picked first", at.BEST, nan_first, GREEDY),
    Mutant("noise of a residual picked", at.RESIDUAL, lambda share: 0.0, GREEDY),
    Mutant("half precision not widened", at.SINGLE, lambda single: lambda x: x, GREEDY),
)

MUTANTS = (*SELECTION, *ROWS, *CHOICES)
