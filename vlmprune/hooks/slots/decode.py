# SPDX-License-Identifier: Apache-2.0
"""The decode slot: which of the held visual tokens a decode step sees. Nothing is removed."""

from __future__ import annotations

from typing import ClassVar

import torch

from ...core.budget import Budget
from ...core.method import Method
from ..sequence.cache import Marks
from ..state import ForwardState
from . import Attachment, Handle


class DecodeSlot:
    """Hides visual tokens from decode steps, by the mask of the step."""

    in_tower: ClassVar[bool] = False

    def __init__(self, attachment: Attachment, method: Method, budget: Budget | None) -> None:
        self.attachment, self.method, self.budget = attachment, method, budget

    def hooks(self) -> list[Handle]:
        return []

    def missed(self, state: ForwardState) -> set[int]:
        return set()

    def enter(self, state: ForwardState) -> None:
        if state.placements:
            self._remember(state)
        elif state.held_marks and state.new_tokens == 1:
            self._hide(state)

    def _remember(self, state: ForwardState) -> None:
        """Note on the cache which slots of every view are visual."""
        for view in state.views.all:
            visual = state.views.follow(torch.stack(state.columns.visual).any(dim=0), view.start)
            held = torch.cat([torch.zeros_like(view.held), visual.to(view.held.device)], dim=1)
            state.marks.setdefault(view.start, Marks(torch.zeros_like(held), held))

    def _hide(self, state: ForwardState) -> None:
        held_marks = state.held_marks
        for number, view in enumerate(state.views.all):
            marks = held_marks.get(view.start)
            if marks is None:
                continue
            visual = marks.fit(view.held.shape[1]).visual & view.held
            seen = self.method.visible(visual, state.step)
            state.views.all[number] = view.hiding(visual & ~seen)
