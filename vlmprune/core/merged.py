# SPDX-License-Identifier: Apache-2.0
"""Merged: rows that replace tokens, and what each of them is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, eq=False)
class Merged:
    """What a merging method returns.

    Args:
        features: (B, K, D) rows for the language model, in the order it shall read them.
        slots: (B, K) int64, the token whose place each row takes; -1 for a row without a place of its own
            ([CLS]).
        context: (K,) bool, rows that stand for many tokens and are listed after the others where tiles are
            interleaved.
        joins: gives (B, N) int64, the row that each token became part of, -1 where it is dropped; (B, N, J)
            where a token may be part of several rows, filled up with -1. A function, since only who reads a
            keep map asks. None where nothing is said.
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
            joins=(lambda: _one_batch([ask() for ask in asked])) if len(asked) == len(units) else None,
        )

    def unit(self, number: int) -> Merged:
        """Rows (K, D), slots (K,) and joins (N,) or (N, J) of one unit."""
        ask = self.joins
        return Merged(
            self.features[number],
            self.slots[number],
            self.context,
            None if ask is None else lambda: ask()[number],
        )


def _one_batch(units: Sequence[Tensor]) -> Tensor:
    """The joins of units as one batch; a token may be in more rows in one unit than in another."""
    if all(one.ndim == 2 for one in units):
        return torch.cat(list(units))
    deep = [one if one.ndim == 3 else one[..., None] for one in units]
    most = max(one.shape[2] for one in deep)
    return torch.cat([pad(one, (0, most - one.shape[2]), value=-1) for one in deep])


def names_of(slots: Tensor) -> Tensor:
    """(K,) what keep maps call rows with these slots (K,): the token whose place a row takes, and -2, -3, ...
    for the first, second, ... row without a place of its own.
    """
    placeless = slots < 0
    return torch.where(placeless, -1 - placeless.cumsum(dim=0), slots)


def through(joins: Tensor, step: Tensor) -> Tensor:
    """What ``step`` (K,) or (K, I) says of the rows that joins (N,) or (N, J) number; -1 for no row."""
    if not step.shape[0]:
        return torch.full_like(joins, -1)
    dropped, found = joins < 0, step.to(joins.device)[joins.clamp_min(0)]
    if step.ndim == 1:
        return found.masked_fill(dropped, -1)
    found = found.masked_fill(dropped[..., None], -1)
    return found if joins.ndim == 1 else found.flatten(1)


def numbers(tokens: Tensor) -> Tensor:
    """(B, n) 0, 1, ... for each of tokens (B, n): the rows that they are where they are the first ones."""
    return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)


def joins_of(parts: Sequence[tuple[Tensor, Tensor]], count: int) -> Tensor:
    """(B, N) ``Merged.joins`` of N tokens from pairs of tokens (B, n) and the rows (B, n) that they join."""
    first = parts[0][0]
    found = torch.full((first.shape[0], count), -1, device=first.device)
    for tokens, rows in parts:
        found.scatter_(1, tokens, rows)
    return found
