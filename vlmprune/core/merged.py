# SPDX-License-Identifier: Apache-2.0
"""Merged: rows that replace tokens, and what each of them is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Merged:
    """What a merging method returns.

    Args:
        features: (B, K, D) rows for the language model, in the order it shall read them.
        slots: (B, K) int64, the token whose place each row takes; -1 for a row without a place of its own
            ([CLS]).
        context: (K,) bool, rows that stand for many tokens and are listed after the others where tiles are
            interleaved.
        joins: gives (B, N) int64, the row that each token became part of, -1 where it is dropped. A function,
            since only who reads a keep map asks. None where a token is in several rows, or nothing is said.
    """

    features: Tensor
    slots: Tensor
    context: Tensor | None = None
    joins: Callable[[], Tensor] | None = None

    @classmethod
    def batch(cls, units: Sequence[Merged]) -> Merged:
        """One of all units, which keep as many rows each."""
        asked = [one.joins for one in units if one.joins is not None]
        return cls(
            torch.cat([one.features for one in units]),
            torch.cat([one.slots for one in units]),
            joins=(lambda: torch.cat([ask() for ask in asked])) if len(asked) == len(units) else None,
        )

    def unit(self, number: int) -> Merged:
        """Rows (K, D), slots (K,) and joins (N,) of one unit."""
        ask = self.joins
        return Merged(
            self.features[number],
            self.slots[number],
            self.context,
            None if ask is None else lambda: ask()[number],
        )
