# SPDX-License-Identifier: Apache-2.0
"""Reduced: the rows that a language model reads in place of the tokens of a unit, merged ones included."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .deferred import NOW, Checks
from .method import Merged, Method
from .select import choose, choose_own, rows_at
from .tokens import VisualTokens


@dataclass(frozen=True, eq=False)
class Reduced:
    """What is left of B units of N tokens.

    Args:
        rows: (B, K, D) for the language model, in the order in which it shall read them.
        keep_idx: (B, K) int64, the token whose place each row takes: ascending where nothing is merged, -1
            for a merged row without a place of its own.
        counts: (B,) int64, rows of each unit that are real. They are all K, unless the method counts by
            itself; behind them ``rows`` has zeros and ``keep_idx`` -1.
    """

    rows: Tensor
    keep_idx: Tensor
    counts: Tensor


def reduce_tokens(method: Method, tokens: VisualTokens, k: int | None, checks: Checks = NOW) -> Reduced:
    """What ``method`` leaves of every unit at a budget of k tokens; None: as many as it says itself."""
    features = tokens.need("features")  # (B, N, D)
    if k is None:
        return _own(choose_own(method, tokens, checks), features)
    chosen = choose(method, tokens, k, checks)
    if isinstance(chosen, Merged):
        rows, keep_idx = chosen.features, chosen.slots
    else:
        # a copy: rows of an expanded tensor are one memory, and whoever writes into one would change all
        rows, keep_idx = rows_at(features, chosen), chosen.clone()
    return Reduced(rows, keep_idx, torch.full((tokens.batch,), rows.shape[1]))


def _own(chosen: list[Tensor | Merged], features: Tensor) -> Reduced:
    rows = [
        one.features if isinstance(one, Merged) else features[number][one]
        for number, one in enumerate(chosen)
    ]
    slots = [one.slots if isinstance(one, Merged) else one for one in chosen]
    return Reduced(
        pad_sequence(rows, batch_first=True),
        pad_sequence(slots, batch_first=True, padding_value=-1),
        torch.tensor([one.shape[0] for one in rows]),
    )
