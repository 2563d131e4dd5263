# SPDX-License-Identifier: Apache-2.0
"""Mistakes inside the language model: cuts between layers, recomputed attention rows, re-weighting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mutant_targets as at
import torch
from mutant import Checks, Mutant, Pytest

from vlmprune.core.deferred import NOW

Function = Callable[..., Any]
FASTV = Checks("fastv(layer=2)@9", "llava")


def ranked_by_its_own_layer(cuts: Function) -> Function:
    return lambda *args: tuple(replace(point, source=point.layer) for point in cuts(*args))


def trusted_for_good(forms: Function) -> Function:
    """What was compared once is trusted under all checks, also in a server that runs for weeks."""
    return lambda call, checks: forms(call, checks if checks.lasting else NOW)


def first_rater(raters: Function) -> Function:
    """Of the words that rank, the first one alone does."""

    def changed(self: Any, state: Any, spans: Any) -> Any:
        found, _ = raters(self, state, spans)
        return found & (found.cumsum(dim=1) == 1), 1

    return changed


def keeping(name: str) -> Function:
    """Layers after a cut are handed what the layers before it had, as far as it reaches."""

    def change(layer: Function) -> Function:
        def changed(self: Any, index: int, module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
            found = layer(self, index, module, args, kwargs)
            if found is None:
                return None
            given, options = found
            old = kwargs.get(name)
            if name == "position_embeddings":
                old = tuple(angle[:, : given[0].shape[1]] for angle in old)
            return given, {**options, name: old}

        return changed

    return change


def looking_back_only(masked: Function) -> Function:
    return lambda self, logits, rows: masked(replace(self, mask=None), logits, rows)


def marks_of_the_first_row(select: Function) -> Function:
    def changed(self: Any, rows: Any) -> Any:
        return replace(select(self, rows), marked=select(self, rows * 0).marked)

    return changed


def marks_forgotten(held_marks: Function) -> Function:
    return lambda self: {}


def padding_rates_too(queries: Function) -> Function:
    """Rows with fewer raters count their repeated last one as often as it is repeated."""

    def changed(self: Any, state: Any, index: int) -> Any:
        rows, real = queries(self, state, index)
        return rows, None if real is None else torch.ones_like(real)

    return changed


def no_soft_cap(logits: Function) -> Function:
    def changed(self: Any, rows: Any) -> Any:
        return logits(replace(self, options={**self.options, "softcap": None}), rows)

    return changed


def query_heads_apart(logits: Function) -> Function:
    """Query heads that share a key head lie apart, not side by side."""

    def changed(self: Any, rows: Any) -> Any:
        shared = self.keys.shape[1]
        queries = self.queries.unflatten(1, (-1, shared)).transpose(1, 2).flatten(1, 2)
        return logits(replace(self, queries=queries), rows)

    return changed


def softmax_of_a_part(attention: Function) -> Function:
    """Weights add up to 1 over the keys of this call alone, not over all that the row sees."""

    def changed(self: Any, rows: Any) -> Any:
        weights = attention(self, rows)
        return weights / weights[..., -self.queries.shape[2] :].sum(dim=-1, keepdim=True)

    return changed


def heads_apart(weigh: Function) -> Function:
    """Query heads that share values lie apart, not side by side."""

    def changed(self: Any, weights: Any) -> Any:
        shared = self.values.shape[1]
        return weigh(self, weights.unflatten(1, (-1, shared)).transpose(1, 2).flatten(1, 2))

    return changed


def unmoved(nearest: Function) -> Function:
    return lambda wanted, there: list(wanted)


def without_a_norm(attention_norm: Function) -> Function:
    return lambda layer: lambda states: states


def first_query_for_the_last(product: Function) -> Function:
    def changed(self: Any, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if len(args) > 1 and args[1] is self.queries:
            args = (args[0].flip(1), *args[1:])
        return product(self, function, types, args, kwargs)

    return changed


REWEIGHT = Pytest("tests/core/test_reweight.py")
TAP = Pytest("tests/core/test_attention_tap.py")
MUTANTS = (
    Mutant(
        "off-by-one layer inside",
        at.FASTV_CUTS,
        ranked_by_its_own_layer,
        Pytest("tests/methods/test_fastv.py"),
    ),
    Mutant("one word of the question ranks", at.RATERS, first_rater, Checks("adaptinfer@0.5", "llava")),
    Mutant(
        "wrong position policy inside", at.FASTV_POSITIONS, lambda policy: "compact", Pytest("tests/golden")
    ),
    Mutant("later layers keep the old mask", at.LAYER, keeping("attention_mask"), FASTV),
    Mutant(
        "later layers keep the old angles",
        at.LAYER,
        keeping("position_embeddings"),
        Checks("pyramiddrop@0.5", "llava"),
    ),
    Mutant("sinks of every row", at.MARKS_SELECT, marks_of_the_first_row, REWEIGHT),
    Mutant("sinks forgotten when decoding", at.HELD_MARKS, marks_forgotten, REWEIGHT),
    Mutant(
        "recomputed rows look back only", at.MASKED, looking_back_only, Checks("sparsevlm@0.25", "paligemma")
    ),
    Mutant("values of other heads weighed", at.WEIGH, heads_apart, REWEIGHT),
    Mutant(
        "raters that fill up rows rate",
        at.QUERIES,
        padding_rates_too,
        Pytest("tests/methods/test_sparsevlm_in_model.py"),
    ),
    Mutant("soft cap of the logits left out", at.LOGITS, no_soft_cap, TAP),
    Mutant("query heads apart", at.LOGITS, query_heads_apart, TAP),
    Mutant(
        "a served tower compared once",
        at.COMPARED_FORMS,
        trusted_for_good,
        Pytest("tests/core/test_compared.py"),
    ),
    Mutant("softmax of a part of the row", at.ATTENTION, softmax_of_a_part, TAP),
    Mutant(
        "defaults left where no layer attends",
        at.NEAREST_LAYERS,
        unmoved,
        Pytest("tests/core/test_landing.py"),
    ),
    Mutant(
        "states without the norm of attention",
        at.ATTENTION_NORM,
        without_a_norm,
        Pytest("tests/core/test_attention_norm.py"),
    ),
    Mutant("first query probed for the last", at.ONLY_WHAT_RANKS, first_query_for_the_last, TAP),
)
