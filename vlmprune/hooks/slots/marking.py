# SPDX-License-Identifier: Apache-2.0
"""Where the marks of an attention edit come from: hidden states, columns of attention, or the vision tower.

A method overrides at most one of ``mark``, ``mark_columns`` and ``mark_tokens``; marks are made once per
prompt and layer, and stand over the columns of the call.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ...core.method import Method, needs_of
from ...errors import SpecError
from ..attention_call import AttentionCall, over_slots
from ..state import ForwardState
from ..vision.pictures import make_units, stack_units
from . import Attachment
from .cutting import listed


class Marking(Protocol):
    """A source of marks."""

    def enter(self, attachment: Attachment, state: ForwardState) -> None:
        """What can be known before the first layer runs."""

    def find(
        self, attachment: Attachment, state: ForwardState, layer: int, call: AttentionCall, hidden: Tensor
    ) -> Tensor:
        """(B, n), or (B, H, n) per head, marks of the columns that enter a layer (B, n, D)."""


class ByStates:
    """Marks by the hidden states that enter a layer."""

    def __init__(self, method: Method) -> None:
        self.method = method

    def enter(self, attachment: Attachment, state: ForwardState) -> None:
        pass

    def find(
        self, attachment: Attachment, state: ForwardState, layer: int, call: AttentionCall, hidden: Tensor
    ) -> Tensor:
        return self.method.mark(hidden, attachment.adapter.language_model)


class ByColumns:
    """Marks by what the queries of the prompt give each slot, per head."""

    def __init__(self, method: Method) -> None:
        self.method = method

    def enter(self, attachment: Attachment, state: ForwardState) -> None:
        pass

    def find(
        self, attachment: Attachment, state: ForwardState, layer: int, call: AttentionCall, hidden: Tensor
    ) -> Tensor:
        view, new = state.views.at(layer), hidden.shape[1]
        queries = view.new.to(hidden.device).clone()  # (B, n)
        queries[:, new - state.generated :] = False  # the prompt ends before them
        total, seen = call.given(queries)  # (B, H, S) and (B, S) over keys
        total, seen = over_slots(total, view.width), over_slots(seen, view.width)
        visual = torch.zeros_like(seen, dtype=torch.bool)
        visual[:, view.width - new :] = state.views.follow(state.columns.pictures, layer).to(hidden.device)
        marked = self.method.mark_columns(total / seen.clamp_min(1)[:, None], seen, visual, layer)
        marked = marked & state.columns.with_pictures.to(hidden.device)[..., None]
        return marked[..., view.width - new :]


class ByTokens:
    """Marks by what the vision tower saw, per crop; newlines and [CLS] tokens have none."""

    def __init__(self, method: Method) -> None:
        self.method = method

    @torch.no_grad()
    def enter(self, attachment: Attachment, state: ForwardState) -> None:
        pictures, samples = listed(state)
        needs, projector = needs_of(self.method), attachment.adapter.projector
        units = make_units(pictures, samples, "crop")
        groups: dict[tuple, list[int]] = defaultdict(list)
        for number, unit in enumerate(units):
            groups[(unit.count, unit.grids)].append(number)
        device = state.embeds.device
        marks = [torch.zeros(picture.length, dtype=torch.int8, device=device) for picture in pictures]
        for numbers in groups.values():
            tokens = stack_units([units[n] for n in numbers], pictures, needs, projector, state.checks)
            for number, found in zip(numbers, self.method.mark_tokens(tokens), strict=True):
                ((p, index),) = units[number].members
                own = torch.arange(pictures[p].count) if index is None else index
                # by slots, since newline and [CLS] embeddings stand between the patches
                marks[p][pictures[p].slots_of(own).to(device)] = found.to(device, torch.int8)
        flat = torch.zeros(state.columns.visual[0].numel(), dtype=torch.int8, device=device)
        first = 0
        for placement in state.placements:
            for _, p, start in placement.spans:
                slots = placement.flat[start : start + placement.pictures[p].length]
                flat[slots.to(device)] = marks[first + p]
            first += len(placement.pictures)
        state.visual_marks = flat.view(state.columns.visual[0].shape)

    def find(
        self, attachment: Attachment, state: ForwardState, layer: int, call: AttentionCall, hidden: Tensor
    ) -> Tensor:
        uncut = state.visual_marks
        marked = torch.zeros(hidden.shape[:2], dtype=torch.int8, device=hidden.device)
        for value in range(1, self.method.mark_values + 1):
            there = state.views.follow(uncut == value, layer).to(hidden.device)
            marked = marked.masked_fill(there, value)
        return marked


_SOURCES: dict[str, Callable[[Method], Marking]] = {
    "mark": ByStates,
    "mark_columns": ByColumns,
    "mark_tokens": ByTokens,
}


def marking_of(method: Method) -> Marking:
    """The one source of marks that a method overrides."""
    found = [name for name in _SOURCES if getattr(type(method), name) is not getattr(Method, name)]
    if len(found) != 1:
        raise SpecError(
            f"method {method.name} overrides {', '.join(found) or 'no source of marks'}; an edit of "
            f"attention takes exactly one of {', '.join(_SOURCES)}"
        )
    return _SOURCES[found[0]](method)
