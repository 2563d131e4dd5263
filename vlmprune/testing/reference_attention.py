# SPDX-License-Identifier: Apache-2.0
"""The slow eager twin of attention re-weighting: maps are edited as maps, everything is recomputed for every
token.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ..core.method import Method
from .reference import Kept, beside_layers, language_model
from .reference_inside import last_norm, placed, shared_keys
from .reference_masks import angles_by_hand, mask_by_hand

# number of a layer, what enters it, its mask, its maps, their logits, its values -> outputs of the heads
Mix = Callable[[int, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@contextmanager
def softmax_inputs() -> Iterator[list[Tensor]]:
    """What softmax is given inside the block: eager attention returns maps only."""
    seen: list[Tensor] = []
    own = nn.functional.softmax

    def softmax(values: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(values)
        return own(values, *args, **options)

    with patch.object(nn.functional, "softmax", softmax):
        yield seen


def visual_columns(model: Any, ids: Tensor) -> Tensor:
    return (ids == model.config.image_token_id) | (ids == getattr(model.config, "video_token_id", -1))


@contextmanager
def eager_edited(attention: Any, mix: Callable[[Tensor, Tensor, Tensor], Tensor] | None) -> Iterator[None]:
    """Mix values anew in the eager function of one module; what follows is the model's own."""
    # the function that all layers of this family look up in their module when they run
    names = vars(sys.modules[type(attention).__module__])
    original = names["eager_attention_forward"]

    def forward(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        with softmax_inputs() as raw:
            output, maps = original(module, query, key, value, *args, **options)
        if module is not attention or mix is None:
            return output, maps
        # heads that share values get them one by one
        values = value.repeat_interleave(maps.shape[1] // value.shape[1], dim=1)
        # the softmax that was called last made the maps
        return mix(maps, raw[-1], values).transpose(1, 2).contiguous(), maps

    names["eager_attention_forward"] = forward
    try:
        yield
    finally:
        names["eager_attention_forward"] = original


class AttentionTwin:
    """Decodes one unpadded sample by full recompute, editing eager attention maps of an eager model.

    Args:
        visual: which tokens of the prompt are of a picture.
        marks: marks of the tokens of the prompt, for methods that make them from the vision tower.
    """

    def __init__(
        self,
        model: Any,
        method: Method,
        kept: Kept,
        visual: Sequence[bool],
        marks: Sequence[int] | None = None,
    ) -> None:
        self.model, self.method, self.kept = model, method, kept
        self.visual = torch.tensor(visual)
        self.marks = None if marks is None else torch.tensor(marks)
        self.prompt = kept.embeds.shape[1]
        self.edited = 0  # heads or rows that were changed
        self.text_heads: dict[int, Tensor] = {}  # layer -> (1, H, d) of the prompt without its pictures
        # the prompt without its pictures is read once, at positions of its own
        if method.kind() == "head_scales" and self.visual.any():
            text = kept.columns(~self.visual)
            places = torch.arange(text.embeds.shape[1]).expand_as(text.positions)
            self._run(replace(text, positions=places), self._note_text)

    def logits(self, new: Tensor | None) -> Tensor:
        kept = self.kept if new is None else self.kept.grown(new)
        return self._run(kept, self._mixed if self.visual.any() else None)

    def _run(self, kept: Kept, mix: Mix | None) -> Tensor:
        """(n, vocabulary) logits; ``mix`` says what the heads of the method's layers put out."""
        lm = language_model(self.model)
        hidden = kept.embeds
        n = hidden.shape[1]
        layers = self.method.acts_on(len(lm.layers))
        shared, beside = shared_keys(lm.layers[0]), beside_layers(self.model, kept, range(n))
        for index, layer in enumerate(lm.layers):
            options = shared | beside[index]
            angles = angles_by_hand(lm, index, hidden, kept.positions)
            if not hasattr(layer, "self_attn"):  # it keeps a running state: there is no attention to edit
                hidden = layer(hidden, position_embeddings=angles, attention_mask=None)
                continue
            mask = mask_by_hand(self.model.config, index, n, kept.blocks)
            options |= placed(layer.self_attn, kept.positions[..., 0, :])
            edit = None
            if mix is not None and index in layers:
                edit = partial(mix, index, hidden, mask)
            with eager_edited(layer.self_attn, edit):
                hidden = layer(hidden, position_embeddings=angles, attention_mask=mask, **options)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            # DeepStack adds to what the first layers give
            if index < len(kept.stacked):
                hidden = hidden + kept.stacked[index]
        return self.model.lm_head(last_norm(lm)(hidden))[0]

    def _note_text(
        self, index: int, hidden: Tensor, mask: Tensor, maps: Tensor, raw: Tensor, values: Tensor
    ) -> Tensor:
        mixed = maps @ values
        self.text_heads[index] = mixed[:, :, -1]  # (1, H, d)
        return mixed

    def _mixed(
        self, index: int, hidden: Tensor, mask: Tensor, maps: Tensor, raw: Tensor, values: Tensor
    ) -> Tensor:
        """(1, H, n, d) outputs of the heads: maps (1, H, n, n), their logits, values (1, H, n, d)."""
        method, n = self.method, maps.shape[2]
        if method.kind() == "head_scales":
            mixed = maps @ values
            # by the last token of the prompt, also while the answer grows
            factors = method.head_scales(mixed[:, :, self.prompt - 1], self.text_heads[index], index)
            self.edited += int((factors != 1).sum())
            return mixed * factors[..., None, None]
        heads = method.heads_of(index)
        chosen = list(range(maps.shape[1]) if heads is None else heads)
        first_text = int(self.visual.nonzero()[-1]) + 1
        # the first row that is edited
        since = {"text": first_text, "last": self.prompt - 1, "all": 0}[method.rows]
        visual = nn.functional.pad(self.visual, (0, n - self.prompt))[None]
        marked = self._marked(index, hidden, maps[:, chosen], mask, visual)
        rows = maps[:, chosen, since:]
        if method.kind() == "relogit":
            # 0 where a row may not look, as the attention slot gives it
            hidden_ones = mask[:, :, since:] < 0
            logits = method.relogit(raw[:, chosen, since:].masked_fill(hidden_ones, 0.0), marked, visual)
            edited = logits.masked_fill(hidden_ones, -torch.inf).softmax(dim=-1)
        else:
            edited = method.reweight(rows, marked, visual)
        self.edited += int((edited != rows).any(-1).sum())
        maps = maps.clone()
        maps[:, chosen, since:] = edited
        return maps @ values

    def _marked(self, index: int, hidden: Tensor, maps: Tensor, mask: Tensor, visual: Tensor) -> Tensor:
        """(1, n) or (1, H, n) marks, which are those of the prompt."""
        n, prompt = hidden.shape[1], self.prompt
        if self.marks is not None:
            return nn.functional.pad(self.marks, (0, n - prompt))[None]
        if type(self.method).mark_columns is not Method.mark_columns:
            seen = (mask[0, :, :prompt, :prompt] == 0).sum(dim=1)  # (1, prompt)
            mean = maps[:, :, :prompt, :prompt].sum(dim=2) / seen
            found = self.method.mark_columns(mean, seen, visual[:, :prompt], index)
            return nn.functional.pad(found, (0, n - prompt))
        marked = self.method.mark(hidden, language_model(self.model))
        # new tokens are no part of the marks
        marked[:, prompt:] = False
        return marked

    def greedy(self, count: int) -> list[int]:
        ids: list[int] = []
        new = None
        for _ in range(count):
            with torch.no_grad():
                logits = self.logits(new)[-1]
            logits[self.model.generation_config.suppress_tokens] = -torch.inf
            ids.append(int(logits.argmax()))
            new = self.model.get_input_embeddings()(torch.tensor([ids])).detach()
        return ids
