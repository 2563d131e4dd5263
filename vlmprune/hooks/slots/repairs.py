# SPDX-License-Identifier: Apache-2.0
"""The slot inside the language model for methods that repair behind their cuts what the cuts changed.

At a cut it is noted what was dropped; at the output of a later layer the rows that give the answer, which are
the last of the prompt and every one behind it, are handed to the method with that note. The note is attached
to the KV cache and holds for all later tokens. Without a budget the method says how many tokens stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...core.budget import Budget
from ...core.method import Merged, Method
from ...core.select import choose_own, rows_at
from ...core.tokens import VisualTokens
from ...errors import UnsupportedError
from ..sequence.cache import Note
from ..state import ForwardState
from . import Attachment, Handle
from .inside_lm import InsideLM
from .ranking import LayerTokens, Ranked
from .spans import Span

# norms in front of the attention of a layer, as decoders of transformers call them
_BEFORE_ATTENTION = ("input_layernorm", "attention_layernorm", "operator_norm")
_BEHIND_ATTENTION = ("post_attention_layernorm", "post_feedforward_layernorm")


def attention_norm(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """What a decoder layer does to hidden states before its attention reads them.

    OLMo 2 and EXAONE 4 norm what attention and the feed-forward part return, and attention reads the states
    as they are.
    """
    if getattr(layer, "norm_after", False):  # Molmo 2: by a choice of the config, under one name
        return nn.Identity()
    for name in _BEFORE_ATTENTION:
        if hasattr(layer, name):
            norm: Callable[[Tensor], Tensor] = getattr(layer, name)
            return norm
    if all(hasattr(layer, name) for name in _BEHIND_ATTENTION):
        return nn.Identity()
    raise UnsupportedError(
        f"{type(layer).__name__} has none of the norms {list(_BEFORE_ATTENTION)}, so that what its attention "
        "reads is not known; use a method that ranks by attention, e.g. 'pyramiddrop@0.5'"
    )


class RepairSlot(InsideLM):
    """Cuts of one method, and its repairs of the answer."""

    def __init__(self, attachment: Attachment, method: Method, budget: Budget | None) -> None:
        super().__init__(attachment, method, budget)
        self.repairs = dict(method.repairs_on(attachment.depth))
        for index in self.layers:
            attention_norm(self.language_model.layers[index])  # refused now and not in a call

    def hooks(self) -> list[Handle]:
        """Those of cuts, and one on the output of every layer that is repaired."""
        found = super().hooks()
        layers = self.language_model.layers
        return found + [
            layers[index].register_forward_hook(partial(self._repaired, index, source))
            for index, source in self.repairs.items()
        ]

    def enter(self, state: ForwardState) -> None:
        super().enter(state)
        if state.held_notes and not state.placements:
            state.views  # noqa: B018 - opens them: the last token is told from padding by them

    # --- cuts -------------------------------------------------------------------------------------

    def _leaving(self, state: ForwardState, index: int) -> list[tuple[Span, int]]:
        if self.budget is not None:
            return super()._leaving(state, index)
        return [(span, span.count) for span in state.tracked.spans]  # the method is asked

    def _choose(
        self, tokens: VisualTokens, k: int, state: ForwardState
    ) -> Tensor | Merged | Sequence[Tensor]:
        if self.budget is not None:
            return super()._choose(tokens, k, state)
        return [one for one in choose_own(self.method, tokens, state.checks) if isinstance(one, Tensor)]

    def _tokens(
        self, state: ForwardState, index: int, spans: Sequence[Span], hidden: Tensor, ranked: Ranked
    ) -> LayerTokens:
        tokens = super()._tokens(state, index, spans, hidden, ranked)
        norm = attention_norm(self.language_model.layers[index])
        rows = torch.tensor([span.row for span in spans], device=hidden.device)
        text = rows_at(hidden[rows], ranked.rows[rows])  # (U, R, D)
        return tokens.with_fields(layer_inputs=norm(tokens.need("features")), text_inputs=text)

    @torch.compiler.disable
    @torch.no_grad()
    def _cut(self, state: ForwardState, index: int, hidden: Tensor, angles: Sequence[Tensor]) -> Tensor:
        before = [(span.columns, span.ids) for span in state.tracked.spans]
        rest = super()._cut(state, index, hidden, angles)
        found = [
            self._context(span, columns, ids, hidden)
            for span, (columns, ids) in zip(state.tracked.spans, before, strict=True)
        ]
        if found:
            vectors = torch.cat(found)  # (pictures, r)
            total = vectors.new_zeros(hidden.shape[0], vectors.shape[1])
            at = torch.tensor([span.row for span in state.tracked.spans], device=vectors.device)
            count = torch.bincount(at, minlength=hidden.shape[0])[:, None]
            mean = total.index_add(0, at, vectors) / count.clamp_min(1)
            state.notes[index] = Note(mean, count > 0)
        return rest

    def _context(self, span: Span, columns: Tensor, ids: Tensor | None, hidden: Tensor) -> Tensor:
        """(1, r) what is noted of a picture whose tokens stood at ``columns`` (n,) of (B, n, D)."""
        count, device = span.picture.count, hidden.device
        every = torch.arange(count, device=device)
        was = every if ids is None else ids.to(device)
        left = every if span.ids is None else span.ids.to(device)
        dropped = ~torch.isin(was, left)  # (n,)
        states = torch.where(dropped[:, None], hidden[span.row, columns].float(), 0.0)
        mean = states.sum(dim=0) / dropped.sum().clamp_min(1)
        return self.method.repair_context(torch.isin(every, left)[None], mean[None])

    # --- repairs ----------------------------------------------------------------------------------

    @torch.compiler.disable
    def _repaired(self, index: int, source: int, module: nn.Module, args: tuple, output: Any) -> Any:
        """The output of a layer with the rows that answer repaired."""
        state = self.attachment.state()
        if state is None or not state.active or not state.viewed:
            return None
        note = state.notes.get(source) or state.held_notes.get(source)
        if note is None:
            return None  # a conversation without pictures
        hidden = output[0] if isinstance(output, tuple) else output
        rows, there = self._answering(state, index)  # (B, R)
        batch = torch.arange(hidden.shape[0], device=hidden.device)[:, None]
        x = hidden[batch, rows]
        fixed = self.method.repair(index, x, note.vector.to(x.device)).to(x.dtype)
        fixed = torch.where((there & note.there.to(x.device))[..., None], fixed, x)
        hidden = hidden.index_put((batch, rows), fixed)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _answering(self, state: ForwardState, index: int) -> tuple[Tensor, Tensor]:
        """Columns (B, R) of the last token of the prompt and all behind it, and which are tokens (B, R)."""
        view = state.views.at(index)
        valid = view.new  # (B, n)
        prompt = valid.shape[1] - state.generated
        behind = torch.arange(prompt, valid.shape[1], device=valid.device).expand(valid.shape[0], -1)
        rows = torch.cat([view.last_of_prompt(state.generated), behind], dim=1)
        return rows, valid.gather(1, rows)
