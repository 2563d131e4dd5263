# SPDX-License-Identifier: Apache-2.0
"""The decode slot: which of the held visual tokens a decode step sees. Nothing is removed.

A method says it before the step, for all layers, by the mask of the step. Or it looks at the attention of
one layer and says it for the later ones: their rows are recomputed without what is hidden, and the difference
is added to what the attention function gave, which is exact and leaves masks and batches as they are.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ...core.budget import Budget
from ...core.method import Look, Method
from ...errors import UnsupportedError
from ..attention_call import AttentionCall, over_keys, over_slots
from ..attention_tap import tap
from ..sequence.cache import CacheState, Marks
from ..state import ForwardState
from . import Attachment, Handle, all_or_none


class DecodeSlot:
    """Hides visual tokens from decode steps."""

    in_tower: ClassVar[bool] = False

    def __init__(self, attachment: Attachment, method: Method, budget: Budget | None) -> None:
        self.attachment, self.method, self.budget = attachment, method, budget
        self.first = method.looks_from(attachment.depth) if method.kind() == "look" else None

    def hooks(self) -> list[Handle]:
        """Where the method looks: taps on the layer that is watched and on all later ones."""
        found: list[Handle] = []
        if self.first is None:
            return found
        layers = self.attachment.adapter.language_model.layers
        with all_or_none(found):
            found.append(tap(layers[self.first - 1], self.first - 1, self.method.name, self._watch))
            for index in range(self.first, self.attachment.depth):
                found.append(tap(layers[index], index, self.method.name, self._without_hidden))
        return found

    def missed(self, state: ForwardState) -> set[int]:
        return set()

    def enter(self, state: ForwardState) -> None:
        if state.placements:
            self._remember(state)
        elif self._looks(state):
            state.views  # noqa: B018 - opens them: slots that hold tokens are told from padding by them
        elif self.first is None and state.cache_state is not None and self._is_step(state):
            self._hide(state, state.cache_state)
        elif state.cache_state is not None:
            state.cache_state.look = None  # another prompt

    def _remember(self, state: ForwardState) -> None:
        """Note on the cache which slots of every view are visual."""
        if self.first is not None and state.generated:
            raise UnsupportedError(
                f"{self.method.name} hides held tokens from later steps, but use_cache=False holds none: "
                "every step reads the whole prompt again; generate with a cache"
            )
        patches = _patches(state)
        for view in state.views.all:
            visual = state.views.follow(patches, view.start)
            held = torch.cat([torch.zeros_like(view.held), visual.to(view.held.device)], dim=1)
            state.marks.setdefault(view.start, Marks(torch.zeros_like(held), held))

    def _hide(self, state: ForwardState, held: CacheState) -> None:
        for number, view in enumerate(state.views.all):
            marks = held.marks.get(view.start)
            if marks is None:
                continue
            visual = marks.fit(view.held.shape[1]).visual & view.held
            seen = self.method.visible(visual, held.steps)
            # hidden from this step by its mask: the cache goes on holding them
            state.views.all[number] = view.hiding(visual & ~seen)
        if not torch.compiler.is_compiling():  # a graph would have the number of the step as an input
            held.steps += 1

    # --- methods that look ------------------------------------------------------------------------

    def _looks(self, state: ForwardState | None) -> bool:
        """Whether this forward is a decode step of a method that looks."""
        if self.first is None or state is None or not state.active or state.placements:
            return False
        return self._is_step(state)

    def _is_step(self, state: ForwardState) -> bool:
        """Whether this forward, which has no pictures, is a decode step behind a prompt that had some."""
        return bool(state.held_marks) and state.new_tokens == 1

    def _visual(self, state: ForwardState) -> Tensor:
        """(B, slots) bool, visual slots of the one view that there is."""
        if len(state.views.all) > 1:
            raise UnsupportedError(
                f"{self.method.name} looks at one layer and hides from later ones, which hold other tokens "
                "behind a cut inside the language model; combine it with a cut before it, as in "
                f"'dycoke@0.5+{self.method.name}'"
            )
        valid = state.views.at(0).valid
        return state.held_marks[0].fit(valid.shape[1]).visual & valid

    @torch.compiler.disable
    def _watch(self, call: AttentionCall, output: Tensor) -> None:
        """Ask the method what the later layers of this step see."""
        state = self.attachment.state()
        if state is None or state.cache_state is None or not self._looks(state):
            return
        visual = self._visual(state).to(output.device)
        rows = torch.zeros(output.shape[0], 1, dtype=torch.int64, device=output.device)
        with torch.no_grad():
            attention = call.attention(rows)  # (B, H, 1, S)
            before = state.cache_state.look
            # at the first step behind a prompt: later ones have the same form
            if before is None:
                call.check(rows, None, attention, output, state.checks)
            mean = over_slots(attention[:, :, 0].mean(dim=1), visual.shape[1]).masked_fill(~visual, 0.0)
            before = None if before is None else before.fit(visual.shape[1])
            seen = self.method.look(mean, visual, before) & visual
        state.cache_state.look = Look(mean, seen)

    @torch.compiler.disable
    def _without_hidden(self, call: AttentionCall, output: Tensor) -> Tensor | None:
        """The output (B, 1, H, d) of a later layer's attention without what is hidden from this step."""
        state = self.attachment.state()
        if state is None or state.cache_state is None or not self._looks(state):
            return None
        look = state.cache_state.look
        if look is None:
            return None
        rows = torch.zeros(output.shape[0], 1, dtype=torch.int64, device=output.device)
        with torch.no_grad():
            attention = call.attention(rows)  # (B, H, 1, S)
            hidden = over_keys(self._visual(state).to(output.device) & ~look.visible, attention.shape[-1])
            left = attention.masked_fill(hidden[:, None, None], 0.0)
            # what a sink takes (GPT-OSS) is no key, and stays
            taken = 1 - attention.sum(dim=-1, keepdim=True) if call.options.get("s_aux") is not None else 0.0
            change = left / (left.sum(dim=-1, keepdim=True) + taken) - attention
        return output + call.weigh(change).to(output.dtype)


def _patches(state: ForwardState) -> Tensor:
    """(B, L) bool, columns of patches: newline and [CLS] embeddings are always seen."""
    columns = state.columns.pictures
    special = [
        placement.flat[start + picture.specials.to(placement.flat.device)]
        for placement in state.placements
        for _, p, start in placement.spans
        if (picture := placement.pictures[p]).special is not None
    ]
    if not special:
        return columns
    return columns.flatten().index_fill(0, torch.cat(special).to(columns.device), False).view_as(columns)
