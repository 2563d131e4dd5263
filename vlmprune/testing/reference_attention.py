# SPDX-License-Identifier: Apache-2.0
"""The slow eager twin of attention re-weighting: maps are edited as maps, everything is recomputed for every
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.method import Method
from .reference import Kept, language_model
from .reference_masks import angles_by_hand, mask_by_hand


def visual_columns(model: Any, ids: Tensor) -> Tensor:
    return (ids == model.config.image_token_id) | (ids == getattr(model.config, "video_token_id", -1))


class AttentionTwin:
    """Decodes one unpadded sample by full recompute, editing eager attention maps of an eager model."""

    def __init__(self, model: Any, method: Method, kept: Kept, visual: Sequence[bool]) -> None:
        self.model, self.method, self.kept = model, method, kept
        self.visual = torch.tensor(visual)
        self.prompt = kept.embeds.shape[1]
        self.edited = 0

    def logits(self, new: Tensor | None) -> Tensor:
        lm = language_model(self.model)
        kept = self.kept if new is None else self.kept.grown(new)
        hidden = kept.embeds
        n = hidden.shape[1]
        visual = torch.nn.functional.pad(self.visual, (0, n - self.prompt))
        first_text = int(self.visual.nonzero()[-1]) + 1 if self.visual.any() else n
        layers = self.method.acts_on(len(lm.layers))
        for index, layer in enumerate(lm.layers):
            attention = layer.self_attn
            normed = layer.input_layernorm(hidden)
            angles = angles_by_hand(lm, index, hidden, kept.positions)
            mask = mask_by_hand(self.model.config, index, n, kept.blocks)
            out, maps = attention(hidden_states=normed, position_embeddings=angles, attention_mask=mask)[:2]
            if index in layers and self.visual.any():
                marked = self.method.mark(hidden, lm)[0]
                marked[self.prompt :] = False  # marks are those of the prompt
                rows = maps[:, :, first_text:]
                edited = self.method.reweight(rows, marked[None], visual[None])
                self.edited += int((edited != rows).any(-1).sum())
                values = attention.v_proj(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                values = values.repeat_interleave(maps.shape[1] // values.shape[1], dim=1)
                new_maps = torch.cat([maps[:, :, :first_text], edited], dim=2)
                out = attention.o_proj((new_maps @ values).transpose(1, 2).flatten(2))
            handle = attention.register_forward_hook(lambda module, args, output, out=out: (out, *output[1:]))
            hidden = layer(hidden, position_embeddings=angles, attention_mask=mask)
            handle.remove()
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            if index < len(kept.stacked):
                hidden = hidden + kept.stacked[index]
        return self.model.lm_head(lm.norm(hidden))[0]

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
