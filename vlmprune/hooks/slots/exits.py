# SPDX-License-Identifier: Apache-2.0
"""The slot inside the language model for methods that ask before each layer whether all visual tokens leave.

Every prompt of a batch is asked by its own text, until its tokens are gone. A prompt whose text says nothing
yet, because less than two tokens stand behind its pictures, keeps them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.budget import Budget
from ...core.method import Method
from ..state import ForwardState
from . import Attachment, Slot
from .inside_lm import InsideLM
from .repairs import RepairSlot
from .spans import Span

_FEWEST = 2  # tokens of text: what a gate reads is the last one and the mean of the others


class ExitSlot(InsideLM):
    """Cuts all tokens of a prompt where its method says so."""

    def _leaving(self, state: ForwardState, index: int) -> list[tuple[Span, int]]:
        leaving = state.tracked.leaving
        return [(span, 0) for span in state.tracked.spans if span.row in leaving and span.count]

    @torch.compiler.disable
    def _cut(self, state: ForwardState, index: int, hidden: Tensor, angles: Sequence[Tensor]) -> Tensor:
        state.tracked.leaving = self._asked(state, index, hidden)
        return super()._cut(state, index, hidden, angles)

    @torch.no_grad()
    def _asked(self, state: ForwardState, index: int, hidden: Tensor) -> set[int]:
        """Rows whose tokens leave at the input (B, n, D) of a layer."""
        # a prompt leaves as a whole, with all its pictures
        rows = sorted({span.row for span in state.tracked.spans if span.count})
        if not rows:
            return set()
        text = state.views.follow(state.text_after_pictures(), index) & state.views.at(index).new
        text[:, text.shape[1] - state.generated :] = False
        found = set()
        for row in rows:
            columns = text[row].nonzero()[:, 0].to(hidden.device)
            # one by one: a sum over padding would be rounded otherwise than the row alone
            if columns.shape[0] >= _FEWEST and bool(self.method.leaves(hidden[row, columns][None], index)[0]):
                found.add(row)
        return found


def inside_slot(attachment: Attachment, method: Method, budget: Budget | None) -> Slot:
    """The slot for cuts that a schedule makes, or that a method is asked for."""
    if method.repairs:
        return RepairSlot(attachment, method, budget)
    return (ExitSlot if method.gated else InsideLM)(attachment, method, budget)
