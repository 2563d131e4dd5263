# SPDX-License-Identifier: Apache-2.0
"""Plain tensors of a user as tokens: what can be chosen of them, by which method, and how many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .core.budget import Budget
from .core.grid import blocks_of
from .core.merged import Merged
from .core.method import Method
from .core.select import choose_own
from .core.tokens import VisualTokens
from .errors import InvariantError, SpecError, UnsupportedError, did_you_mean


def without_model(method: Method, text: str) -> None:
    """Refuse methods of slots that cannot act on plain tensors."""
    if method.slot in ("encoder", "attention", "decode"):
        raise UnsupportedError(
            f"{text!r} acts in the slot {method.slot!r}, which needs a model that runs; use "
            "prune(...) and read run.last.keep"
        )
    method.kind()  # raises if the class implements no verb of its slot


def to_keep(method: Method, budget: Budget | None, text: str, tokens: VisualTokens) -> int | None:
    """How many of the tokens of a unit stay; None: the method says it by itself."""
    if budget is not None:
        crops, units = len(tokens.grids), tokens.batch
        if (budget.scope == "crop" and crops > 1) or (budget.scope == "total" and units > 1):
            has = f"a unit has {crops} crops" if budget.scope == "crop" else f"there are {units} units"
            whole = "each crop as a unit" if budget.scope == "crop" else "all pictures as one unit"
            raise SpecError(f"{text!r} is not spent on units of plain tensors, and {has} here; give {whole}")
        return budget.count(tokens.count)
    if method.counts != "budget" and type(method).own is not Method.own:
        return None
    if method.counts != "budget":
        raise UnsupportedError(
            f"{text!r} says while a model runs when tokens leave, so plain tensors cannot be cut by it; use "
            "prune(...) and read run.last"
        )
    if method.budgeted:
        # a schedule of cuts is one of a model
        raise SpecError(f"{text!r} needs a budget here: give keep=64 (tokens) or keep=0.25 (fraction)")
    return tokens.count


def given_tokens(verb: str, tensors: Mapping[str, Any], grid: Any) -> VisualTokens:
    """Tensors of a user as tokens, refused where nothing can be chosen by them."""
    fields = [name for name in VisualTokens.__dataclass_fields__ if name not in ("size", "checks")]
    known = ["grid" if name == "grids" else name for name in fields]
    for name in tensors:
        if name not in known:
            raise SpecError(f"{verb} got {name!r}; expected {known}.{did_you_mean(name, known)}")
    tokens = VisualTokens(**tensors, grids=blocks_of(grid))
    if tokens.count == 0 or tokens.batch == 0:
        raise SpecError(f"there are no tokens to choose from: batch {tokens.batch}, tokens {tokens.count}")
    for name, value in tensors.items():
        # towers without [CLS] and prompts without words give empty ones of these
        if isinstance(value, Tensor) and value.numel() == 0 and name not in ("cls_features", "text_embeds"):
            raise SpecError(
                f"{name} has shape {tuple(value.shape)}, which holds nothing to choose by; expected no empty "
                "axis"
            )
        if isinstance(value, Tensor) and not bool(value.isfinite().all()):
            raise InvariantError(
                f"{name} of shape {tuple(value.shape)} has values that are not finite; expected none"
            )
    return tokens


def own_indices(method: Method, tokens: VisualTokens) -> Tensor:
    """(B, K) ascending indices, -1 behind those of a unit that keeps fewer than others."""
    with torch.no_grad():
        rows = [one.slots if isinstance(one, Merged) else one for one in choose_own(method, tokens)]
    kept = [row[row >= 0].sort().values for row in rows]  # -1: a merged row without a place
    return torch.nn.utils.rnn.pad_sequence(kept, batch_first=True, padding_value=-1)
