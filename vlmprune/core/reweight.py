# SPDX-License-Identifier: Apache-2.0
"""Attention re-weighting: the third slot. Chosen rows of chosen layers get another attention; the layer stays on its fast path.

Where a layer's attention function has run, the rows that the method edits are recomputed, and what the edit changes, ``(A' - A) V``,
is added to the function's output. That is exact, since the output is linear in the attention. Marks that a method makes in a prompt
(sinks) and the visual columns ride on the KV cache, for decode steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .attention_tap import AttentionCall, over_keys, tap
from .base import Method
from .call import Call


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
        """A pre-hook on every chosen layer and a tap on its attention."""
        found: list[Any] = []
        try:
            for index in self.layers:
                layer = self.session.adapter.language_model.layers[index]
                found.append(layer.register_forward_pre_hook(partial(self._before, index), with_kwargs=True))
                found.append(tap(layer, index, self.method.name, partial(self._edit, index)))
        except BaseException:
            for handle in found:
                handle.remove()
            raise
        return found

    def _before(self, index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call: Call | None = self.session.call
        if call is not None and call.frames and self.session.enabled:
            call.given = (index, args[0] if args else kwargs["hidden_states"])

    @torch.compiler.disable
    def _edit(self, index: int, attended: AttentionCall, output: Tensor) -> Tensor | None:
        """The output (B, n, H, d) of a layer's attention with the chosen rows edited."""
        call: Call | None = self.session.call
        if call is None or call.given is None or call.given[0] != index:
            return None
        hidden, call.given = call.given[1], None
        valid = call.frame(index).valid.to(hidden.device)  # (B, slots)
        marks = self._marks(call, index, hidden, valid)
        rows, real = self._rows(call, index, valid[:, valid.shape[1] - hidden.shape[1] :])
        if rows is None:
            return None
        with torch.no_grad():
            attention = attended.attention(rows)  # (B, H, R, S)
            if call.placed:
                attended.check(rows[:, -1:], real[:, -1:], attention[:, :, -1:], output)
            marked, visual = (over_keys(mask & valid, attention.shape[-1]) for mask in (marks.marked, marks.visual))
            edited = self.method.reweight(attention, marked, visual)
            change = torch.where(real[:, None, :, None], edited - attention, 0.0)
        moved = attended.weigh(change).to(output.dtype)  # (B, R, H, d)
        batch = torch.arange(output.shape[0], device=output.device)[:, None].expand_as(rows)
        return output.index_put((batch, rows), moved, accumulate=True)

    def _marks(self, call: Call, index: int, hidden: Tensor, valid: Tensor) -> Marks:
        """Marks over all slots of this layer: earlier ones from the cache, new ones where a prompt is read."""
        width, fed = valid.shape[1], hidden.shape[1]
        held = call.marks_before.get(index)
        if not call.placed:  # later turns and decode steps reuse the marks of the prompt with the pictures
            new = Marks(*(torch.zeros_like(valid[:, -fed:]) for _ in range(2)))
        else:
            with torch.no_grad():
                marked = self.method.mark(hidden, self.session.adapter.language_model)
                if call.tail:
                    marked[:, fed - call.tail :] = False  # the prompt ends before them
                new = Marks(
                    marked,
                    call.visual_of(index).to(hidden.device),
                )
        if held is None:
            marks = Marks(*(_front(mask, width) for mask in (new.marked, new.visual)))
        else:
            past = held.fit(width - fed)
            marks = Marks(torch.cat([past.marked, new.marked], dim=1), torch.cat([past.visual, new.visual], dim=1))
        call.marks[index] = marks
        return marks

    def _rows(self, call: Call, index: int, fed: Tensor) -> tuple[Tensor | None, Tensor]:
        """Rows that may be edited: the text after the last picture in a prompt, every row of a decode step."""
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
