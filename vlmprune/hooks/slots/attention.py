# SPDX-License-Identifier: Apache-2.0
"""The attention slot: chosen rows of chosen layers get another attention; the layer stays on its fast path.

Where a layer's attention function has run, the rows that the method edits are recomputed, and what the edit
changes, ``(A' - A) V``, is added to the function's output. That is exact, since the output is linear in the
attention. Marks that a method makes in a prompt (sinks) and the visual columns are attached to the KV
cache, for decode steps.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.budget import Budget
from ...core.method import Method
from ..attention_call import AttentionCall, over_keys
from ..attention_tap import tap
from ..sequence.cache import Marks
from ..state import ForwardState
from . import Attachment, Handle


class AttentionSlot:
    """Edits the attention of one model by one method."""

    in_tower: ClassVar[bool] = False

    def __init__(self, attachment: Attachment, method: Method, budget: Budget | None) -> None:
        self.attachment, self.budget = attachment, budget
        self.language_model = attachment.adapter.language_model
        self.method = method.prepare(self.language_model)
        self.layers = list(self.method.acts_on(attachment.depth))

    def hooks(self) -> list[Handle]:
        """A pre-hook on every chosen layer, and a tap on its attention."""
        found: list[Handle] = []
        try:
            for index in self.layers:
                layer = self.language_model.layers[index]
                found.append(layer.register_forward_pre_hook(partial(self._before, index), with_kwargs=True))
                found.append(tap(layer, index, self.method.name, partial(self._edit, index)))
        except BaseException:
            for handle in found:
                handle.remove()
            raise
        return found

    def enter(self, state: ForwardState) -> None:
        if state.placements or state.held_marks:
            state.views  # noqa: B018 - opens them: rows that may be edited are told from padding by them

    def missed(self, state: ForwardState) -> set[int]:
        return set(self.layers) - state.edited if state.placements else set()

    def _before(self, index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        state = self.attachment.state()
        if state is not None and state.viewed and state.active:
            state.entering = (index, args[0] if args else kwargs["hidden_states"])

    @torch.compiler.disable
    def _edit(self, index: int, attended: AttentionCall, output: Tensor) -> Tensor | None:
        """The output (B, n, H, d) of a layer's attention with the chosen rows edited; None where none is."""
        state = self.attachment.state()
        if state is None or state.entering is None or state.entering[0] != index:
            return None
        hidden, state.entering = state.entering[1], None
        if not state.placements and not state.held_marks:
            return None  # a conversation without pictures
        state.edited.add(index)
        valid = state.views.at(index).valid.to(hidden.device)  # (B, slots)
        marks = self._marks(state, index, hidden, valid)
        rows, real = self._rows(state, index, valid[:, valid.shape[1] - hidden.shape[1] :])
        if rows is None:
            return None
        with torch.no_grad():
            attention = attended.attention(rows)  # (B, H, R, S)
            if state.placements:
                attended.check(rows[:, -1:], real[:, -1:], attention[:, :, -1:], output, state.checks)
            held = attention.shape[-1]
            marked, visual = over_keys(marks.marked & valid, held), over_keys(marks.visual & valid, held)
            edited = self.method.reweight(attention, marked, visual)
            change = torch.where(real[:, None, :, None], edited - attention, 0.0)
        moved = attended.weigh(change).to(output.dtype)  # (B, R, H, d)
        batch = torch.arange(output.shape[0], device=output.device)[:, None].expand_as(rows)
        return output.index_put((batch, rows), moved, accumulate=True)

    def _marks(self, state: ForwardState, index: int, hidden: Tensor, valid: Tensor) -> Marks:
        """Marks over all slots of this layer, those of earlier calls from the cache."""
        width, new = valid.shape[1], hidden.shape[1]
        if not state.placements:  # later turns and decode steps reuse the marks of the prompt with pictures
            return state.held_marks[index].fit(width)
        held = state.held_marks.get(index)
        with torch.no_grad():
            marked = self.method.mark(hidden, self.language_model)
        if state.generated:
            marked[:, new - state.generated :] = False  # the prompt ends before them
        visual = state.views.follow(torch.stack(state.columns.visual).any(dim=0), index).to(hidden.device)
        past = width - new
        if past == 0:
            marks = Marks(marked, visual)
        else:
            none = torch.zeros_like(valid[:, :past])
            held = Marks(none, none) if held is None else held.fit(past)
            marks = Marks(torch.cat([held.marked, marked], dim=1), torch.cat([held.visual, visual], dim=1))
        state.marks[index] = marks
        return marks

    def _rows(self, state: ForwardState, index: int, new: Tensor) -> tuple[Tensor | None, Tensor]:
        """Rows (B, R) that may be edited, real ones last, and which are real.

        In a prompt these are the text after the last picture, in a decode step all rows.
        """
        if new.shape[1] == 1 and not state.placements:
            return torch.zeros_like(new, dtype=torch.int64), new
        if state.placements:
            wanted = state.views.follow(state.text_after_pictures(), index).to(new.device) & new
        else:
            wanted = new
        width = int(wanted.sum(dim=1).max())
        if width == 0:
            return None, wanted
        order = wanted.to(torch.int8).argsort(dim=1, stable=True)[:, wanted.shape[1] - width :]
        return order, wanted.gather(1, order)
