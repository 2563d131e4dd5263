# SPDX-License-Identifier: Apache-2.0
"""Mistakes inside the language model: cuts between layers, recomputed attention rows, re-weighting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mutant_targets as at
import torch
from mutant import Checks, Mutant, Pytest

Function = Callable[..., Any]
FASTV = Checks("fastv(layer=2)@9", "llava")


def ranked_by_its_own_layer(stages: Function) -> Function:
    return lambda *args: tuple(replace(stage, source=stage.layer) for stage in stages(*args))


def first_text_token(find_raters: Function) -> Function:
    def changed(self: Any, call: Any, hidden: Any) -> None:
        find_raters(self, call, hidden)
        inside = call.units
        some = inside.text.any(dim=1, keepdim=True)
        text = torch.where(some, inside.text, call.frames[0].fed)
        inside.raters = torch.zeros_like(text).scatter(1, text.int().argmax(dim=1, keepdim=True), True)

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
                width = (given[0] if given else options["hidden_states"]).shape[1]
                old = tuple(angle[:, :width] for angle in old)
            return given, {**options, name: old}

        return changed

    return change


def looking_back_only(visible: Function) -> Function:
    return lambda self, rows: visible(replace(self, mask=None), rows)


def marks_of_the_first_row(select: Function) -> Function:
    def changed(self: Any, rows: Any) -> Any:
        return replace(select(self, rows), marked=select(self, rows * 0).marked)

    return changed


def marks_forgotten(enter: Function) -> Function:
    def changed(self: Any, call: Any, kwargs: Any) -> Any:
        found = enter(self, call, kwargs)
        call.marks_before = {}
        return found

    return changed


def padding_rates_too(padded: Function) -> Function:
    """Rows with fewer raters count their repeated last one as often as it is repeated."""

    def changed(raters: Any) -> Any:
        rows, real = padded(raters)
        return rows, torch.ones_like(real)

    return changed


def no_soft_cap(logits: Function) -> Function:
    def changed(self: Any, rows: Any) -> Any:
        attention = self.layer.self_attn
        cap = getattr(attention, "attn_logit_softcapping", None)
        if cap is None:
            return logits(self, rows)
        attention.attn_logit_softcapping = None
        try:
            return logits(self, rows)
        finally:
            attention.attn_logit_softcapping = cap

    return changed


def heads_apart(weigh: Function) -> Function:
    """Query heads that share values lie apart, not side by side."""

    def changed(self: Any, weights: Any) -> Any:
        shared = self.values().shape[1]
        return weigh(self, weights.unflatten(1, (-1, shared)).transpose(1, 2).flatten(1, 2))

    return changed


REWEIGHT = Pytest("tests/core/test_reweight.py")
MUTANTS = (
    Mutant(
        "off-by-one layer inside",
        at.FASTV_STAGES,
        ranked_by_its_own_layer,
        Pytest("tests/methods/test_fastv.py"),
    ),
    Mutant("wrong query row inside", at.RATERS, first_text_token, FASTV),
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
    Mutant("sinks forgotten when decoding", at.ENTER, marks_forgotten, REWEIGHT),
    Mutant(
        "recomputed rows look back only", at.VISIBLE, looking_back_only, Checks("sparsevlm@0.25", "paligemma")
    ),
    Mutant("values of other heads weighed", at.WEIGH, heads_apart, REWEIGHT),
    Mutant(
        "raters that fill up rows rate",
        at.PADDED,
        padding_rates_too,
        Pytest("tests/methods/test_sparsevlm_in_model.py"),
    ),
    Mutant("soft cap of the logits left out", at.LOGITS, no_soft_cap, Pytest("tests/core/test_rows.py")),
)
