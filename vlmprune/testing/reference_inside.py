# SPDX-License-Identifier: Apache-2.0
"""The slow eager twin of cuts inside the language model: layers called one by one, tokens physically removed, no cache.

Needs a model with ``attn_implementation="eager"``; scores are read off the attention maps that eager attention returns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.base import Method
from ..core.select import choose
from ..core.tokens import VisualTokens


@dataclass
class Twin:
    """One sample: (1, L, D) embeddings, (L,) positions, the columns of each picture, and the columns after the last one."""

    model: Any
    method: Method
    budget: Any
    policy: str
    embeds: Tensor
    pictures: list[list[int]]
    kept: dict[int, list[int]] = field(default_factory=dict)  # layer -> prompt columns that it and later layers read
    chosen: list[list[int]] = field(default_factory=list)

    def logits(self, new: Tensor | None = None) -> Tensor:
        """(n, V) logits after the prompt and ``new`` (1, t, D) embeddings; the cut is made once, by the prompt."""
        lm = self.model.model.language_model
        length = self.embeds.shape[1]
        hidden = self.embeds if new is None else torch.cat([self.embeds, new], 1)
        columns = list(range(hidden.shape[1]))
        numbers = torch.arange(hidden.shape[1])
        spans = [list(p) for p in self.pictures]
        counts = [len(p) for p in self.pictures]
        maps: Tensor | None = None
        choosing = not self.kept
        with torch.no_grad():
            for index, layer in enumerate(lm.layers):
                for number, stage in enumerate(self.method.stages(len(lm.layers), self.budget, counts[0] if counts else 1)):
                    if stage.layer != index or not spans:
                        continue
                    if choosing:
                        if stage.source == index:
                            maps = self._attend(lm, index, hidden, numbers)[1]
                        spans = [self._choose(span, count, number, columns, maps) for span, count in zip(spans, counts, strict=True)]
                        visual = {c for p in self.pictures for c in p}
                        stay = {c for span in spans for c in span}
                        self.kept[index] = [c for c in columns if c not in visual or c in stay]
                    where = [i for i, c in enumerate(columns) if c in set(self.kept[index]) or c >= length]
                    hidden, columns = hidden[:, where], [columns[i] for i in where]
                    numbers = torch.arange(len(columns)) if self.policy == "compact" else numbers[where]
                hidden, maps = self._attend(lm, index, hidden, numbers)
            if choosing:
                self.chosen = spans
            return self.model.lm_head(lm.norm(hidden))[0]

    def _choose(self, span: list[int], count: int, number: int, columns: list[int], maps: Tensor) -> list[int]:
        lm = self.model.model.language_model
        keep = self.method.stages(len(lm.layers), self.budget, count)[number].keep
        if keep >= len(span):
            return span
        at = [columns.index(c) for c in span]
        row = maps[:, :, -1:, at]  # (1, H, 1, N), the last prompt token
        index = choose(self.method, VisualTokens(text_attention=row, features=torch.zeros(1, len(at), 1), stage=number), keep)[0]
        return [span[i] for i in index.tolist()]

    def _attend(self, lm: Any, index: int, hidden: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        layer = lm.layers[index]
        n = hidden.shape[1]
        window = getattr(lm.config, "sliding_window", None)
        at = torch.arange(n)
        seen = at[None, :] <= at[:, None]
        if window is not None:
            seen &= at[None, :] > at[:, None] - window
        mask = torch.zeros(1, 1, n, n).masked_fill(~seen, torch.finfo(torch.float32).min)
        angles = lm.rotary_emb(hidden, numbers[None])
        maps = layer.self_attn(hidden_states=layer.input_layernorm(hidden), position_embeddings=angles, attention_mask=mask)[1]
        out = layer(hidden, attention_mask=mask, position_embeddings=angles)
        return (out[0] if isinstance(out, tuple) else out), maps

    def greedy(self, new_tokens: int) -> list[int]:
        """Greedy answer, everything recomputed for every token."""
        ids: list[int] = []
        banned = self.model.generation_config.suppress_tokens or []
        embed = self.model.get_input_embeddings()
        new = None
        for _ in range(new_tokens):
            logits = self.logits(new)[-1]
            logits[banned] = -torch.inf
            ids.append(int(logits.argmax()))
            new = embed(torch.tensor([ids])).detach()
        return ids
