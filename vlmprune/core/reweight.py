# SPDX-License-Identifier: Apache-2.0
"""Attention re-weighting: the third slot. Chosen rows of chosen layers get another attention; the layer stays on its fast path.

After a layer's attention module has run, the rows that the method edits are recomputed, and what the edit changes, ``(A' - A) V``
through the output projection, is added to the module's output. That is exact, since the output is linear in the attention. Marks
that a method makes in a prompt (sinks) and the visual columns ride on the KV cache, for decode steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .base import Method
from .cache import cache_in
from .call import Call
from .rows import LayerInput


@dataclass(eq=False)
class Marks:
    """(B, S) bool masks over the slots that one layer holds: what the method marked, and what is visual."""

    marked: Tensor
    visual: Tensor

    def select(self, rows: Tensor) -> Marks:
        rows = rows.to(self.marked.device)
        return Marks(self.marked[rows], self.visual[rows])

    def fit(self, width: int) -> Marks:
        """Cut off or fill up with False to ``width`` slots."""
        return Marks(_fit(self.marked, width), _fit(self.visual, width))


def _fit(mask: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(mask[:, :width], (0, max(0, width - mask.shape[1])))


class ReweightHost:
    """Runs one re-weighting method for one session."""

    def __init__(self, session: Any, method: Method) -> None:
        self.session, self.method = session, method
        self.layers = list(method.acts_on(session.depth))

    def hooks(self) -> list[Any]:
        """A pre-hook on every chosen layer and a hook on its attention module."""
        found = []
        for index in self.layers:
            layer = self.session.adapter.language_model.layers[index]
            found.append(layer.register_forward_pre_hook(partial(self._before, index), with_kwargs=True))
            found.append(layer.self_attn.register_forward_hook(partial(self._after, index)))
        return found

    def _before(self, index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call: Call | None = self.session.call
        if call is None or not call.frames or not self.session.enabled:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        cache = cache_in(kwargs)
        frame = call.frame(index)
        cos, sin = kwargs["position_embeddings"]
        mask = frame.typed_mask(self.session.adapter.language_model.config, index, hidden, cache)
        valid = frame.valid.to(hidden.device)
        call.given = LayerInput(module, index, hidden, cos, sin, valid, cache, updated=cache is not None, mask=mask)

    def _after(self, index: int, module: nn.Module, args: tuple, output: Any) -> Any:
        call: Call | None = self.session.call
        given = None if call is None else call.given
        if given is None or given.index != index:
            return None
        call.given = None
        marks = self._marks(call, index, given)
        rows, real = self._rows(call, index, given)
        if rows is None:
            return None
        with torch.no_grad():
            attention = given.attention(rows)  # (B, H, R, S)
            edited = self.method.reweight(attention, marks.marked & given.valid, marks.visual & given.valid)
            change = torch.where(real[:, None, :, None], edited - attention, 0.0)
        moved = given.weigh(change)  # (B, R, H * d)
        states = output[0] if isinstance(output, tuple) else output
        moved = moved.to(states.dtype)
        # through the module, which may be an adapter or have its weights elsewhere; a bias is in the output already
        projected = module.o_proj(moved)
        if getattr(module.o_proj, "bias", None) is not None:
            projected = projected - module.o_proj(torch.zeros_like(moved[:1, :1]))
        states = states.clone()
        batch = torch.arange(states.shape[0], device=states.device)[:, None]
        states.index_put_((batch.expand_as(rows), rows), projected.to(states.dtype), accumulate=True)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def _marks(self, call: Call, index: int, given: LayerInput) -> Marks:
        """Marks over all slots of this layer: earlier ones from the cache, new ones where a prompt is read."""
        width = given.valid.shape[1]
        held = call.marks_before.get(index)
        fed = given.hidden.shape[1]
        if not call.placed:  # later turns and decode steps reuse the marks of the prompt with the pictures
            new = Marks(*(torch.zeros_like(given.valid[:, -fed:]) for _ in range(2)))
        else:
            with torch.no_grad():
                new = Marks(
                    self.method.mark(given.hidden, self.session.adapter.language_model),
                    call.visual_of(index).to(given.hidden.device),
                )
        if held is None:
            marks = Marks(*(_front(mask, width) for mask in (new.marked, new.visual)))
        else:
            past = held.fit(given.past)
            marks = Marks(torch.cat([past.marked, new.marked], dim=1), torch.cat([past.visual, new.visual], dim=1))
        call.marks[index] = marks
        return marks

    def _rows(self, call: Call, index: int, given: LayerInput) -> tuple[Tensor | None, Tensor]:
        """Rows that may be edited: the text after the last picture in a prompt, every row of a decode step."""
        fed = given.valid[:, given.past :]
        if call.placed:
            wanted = call.text_of(index).to(fed.device) & fed
        else:
            wanted = fed if call.marks_before else torch.zeros_like(fed)
        width = int(wanted.sum(dim=1).max())
        if width == 0:
            return None, wanted
        order = wanted.to(torch.int8).argsort(dim=1, stable=True)[:, wanted.shape[1] - width :]
        return order, wanted.gather(1, order)


def _front(mask: Tensor, width: int) -> Tensor:
    """Pad on the left to ``width``: slots held before this call were never marked."""
    return torch.nn.functional.pad(mask, (width - mask.shape[1], 0))
