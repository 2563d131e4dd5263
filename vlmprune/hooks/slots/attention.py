# SPDX-License-Identifier: Apache-2.0
"""The attention slot: chosen rows of chosen layers get another attention; the layer stays on its fast path.

Where a layer's attention function has run, the rows that the method edits are recomputed, and what the edit
changes, ``(A' - A) V``, is added to the function's output. That is exact, since the output is linear in the
attention. An edit of logits is one of weights behind the softmax. Marks that a method makes in a prompt and
the visual columns are attached to the KV cache, for decode steps. Methods that scale heads have a slot of
their own, since nothing has to be recomputed for them.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.budget import Budget
from ...core.method import Method
from ..attention_call import AttentionCall, compared_forms, over_keys
from ..attention_tap import tap
from ..sequence.cache import Marks
from ..state import ForwardState
from . import Attachment, Handle, Slot, all_or_none
from .marking import Marking, marking_of

EDITS = "changes attention inside the language model"


class AttentionSlot:
    """Edits the attention of one model by one method."""

    in_tower: ClassVar[bool] = False

    def __init__(self, attachment: Attachment, method: Method, budget: Budget | None) -> None:
        self.attachment, self.budget = attachment, budget
        self.language_model = attachment.adapter.language_model
        self.method = method.prepare(self.language_model)
        self.layers = list(self.method.acts_on(attachment.depth))
        self.edits_logits = self.method.kind() == "relogit"
        attachment.refuse_checkpointing(self.language_model, method, EDITS)

    @property
    def marking(self) -> Marking:
        """Where the marks of the method come from."""
        return marking_of(self.method)

    def hooks(self) -> list[Handle]:
        """A pre-hook on every chosen layer, and a tap on its attention."""
        found: list[Handle] = []
        with all_or_none(found):
            for index in self.layers:
                layer = self.language_model.layers[index]
                found.append(layer.register_forward_pre_hook(partial(self._before, index), with_kwargs=True))
                found.append(tap(layer, index, self.method.name, partial(self._edit, index)))
        return found

    def enter(self, state: ForwardState) -> None:
        if state.placements:
            self.attachment.refuse_checkpointing(self.language_model, self.method, EDITS)
        if state.placements or state.held_marks:
            state.views  # noqa: B018 - opens them: rows that may be edited are told from padding by them
        if state.placements:
            self.marking.enter(self.attachment, state)

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
        named = self.method.heads_of(index)
        heads = None if named is None else torch.tensor(list(named), device=output.device)
        if heads is not None:
            attended = attended.of_heads(heads)
        marks = self._marks(state, index, attended, hidden, valid)
        rows, real = self._rows(state, index, valid[:, valid.shape[1] - hidden.shape[1] :])
        if rows is None:
            return None
        own = output if heads is None else output[:, :, heads]
        with torch.no_grad():
            change = self._change(state, attended, rows, real, marks, valid, own)
        moved = attended.weigh(change).to(output.dtype)  # (B, R, H, d)
        batch = torch.arange(output.shape[0], device=output.device)[:, None]
        if heads is None:
            return output.index_put((batch, rows), moved, accumulate=True)
        return output.index_put((batch[..., None], rows[..., None], heads), moved, accumulate=True)

    def _change(
        self,
        state: ForwardState,
        attended: AttentionCall,
        rows: Tensor,
        real: Tensor,
        marks: Marks,
        valid: Tensor,
        output: Tensor,
    ) -> Tensor:
        """(B, H, R, S) what the edit adds to the attention of some rows (B, R), the output of these heads
        being (B, n, H, d).
        """
        logits = attended.logits(rows)  # (B, H, R, S)
        attention = attended.weights(logits)
        if state.placements:
            last = attention[:, :, -1:]
            known = compared_forms(attended, state.checks)
            attended.check(rows[:, -1:], real[:, -1:], last, output, state.checks, known)
        held = attention.shape[-1]
        there = valid if marks.marked.ndim == 2 else valid[:, None]
        marked = over_keys(marks.marked * there, held)
        visual = over_keys(marks.visual & valid, held)
        if self.edits_logits:
            hidden = logits <= HIDDEN
            edited = self.method.relogit(logits.masked_fill(hidden, 0.0), marked, visual)
            edited = attended.weights(edited.masked_fill(hidden, -torch.inf))
        else:
            edited = self.method.reweight(attention, marked, visual)
        return torch.where(real[:, None, :, None], edited - attention, 0.0)

    def _marks(
        self, state: ForwardState, index: int, attended: AttentionCall, hidden: Tensor, valid: Tensor
    ) -> Marks:
        """Marks over all slots of this layer, those of earlier calls from the cache."""
        width, new = valid.shape[1], hidden.shape[1]
        if not state.placements:  # later turns and decode steps reuse the marks of the prompt with pictures
            return state.held_marks[index].fit(width)
        held = state.held_marks.get(index)
        with torch.no_grad():
            marked = self.marking.find(self.attachment, state, index, attended, hidden)  # (B, [H,] n)
        if state.generated:
            marked[..., new - state.generated :] = 0  # the prompt ends before them
        visual = state.views.follow(state.columns.pictures, index).to(hidden.device)
        past = width - new
        if past == 0:
            marks = Marks(marked, visual)
        else:
            none = torch.zeros_like(valid[:, :past])
            before = marked.new_zeros(*marked.shape[:-1], past)
            held = Marks(before, none) if held is None else held.fit(past)
            marks = Marks(torch.cat([held.marked, marked], dim=-1), torch.cat([held.visual, visual], dim=1))
        state.marks[index] = marks
        return marks

    def _rows(self, state: ForwardState, index: int, new: Tensor) -> tuple[Tensor | None, Tensor]:
        """Rows (B, R) that may be edited, real ones last, and which are real.

        In a prompt these are the rows that the method names, in a decode step all of them.
        """
        if new.shape[1] == 1 and not state.placements:
            return torch.zeros_like(new, dtype=torch.int64), new
        wanted = self._wanted(state, index, new)
        width = int(wanted.sum(dim=1).max())
        if width == 0:
            return None, wanted
        order = wanted.to(torch.int8).argsort(dim=1, stable=True)[:, wanted.shape[1] - width :]
        return order, wanted.gather(1, order)

    def _wanted(self, state: ForwardState, index: int, new: Tensor) -> Tensor:
        """(B, n) bool, the columns of this call that are edited, of those that are tokens (B, n)."""
        if self.method.rows == "text":
            if not state.placements:
                return new
            return state.views.follow(state.text_after_pictures(), index).to(new.device) & new
        wanted = new
        if self.method.rows == "last":
            prompt = new.shape[1] - state.generated
            after = new[:, :prompt].flip(1).cumsum(dim=1).flip(1)  # tokens of the prompt from here on
            wanted = new.clone()
            wanted[:, :prompt] &= after == 1
        if state.placements:
            wanted = wanted & state.columns.with_pictures.to(new.device)
        return wanted


# logits at or below this are hidden: models fill masks with the most negative number of a type, of which that
# of float16, -65504, is the largest
HIDDEN = -3e4


def attention_slot(attachment: Attachment, method: Method, budget: Budget | None) -> Slot:
    """The slot for what the method edits: weights and logits of rows, or outputs of heads."""
    from .head_scales import HeadScaleSlot

    if method.kind() == "head_scales":
        return HeadScaleSlot(attachment, method, budget)
    return AttentionSlot(attachment, method, budget)
