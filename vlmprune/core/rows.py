# SPDX-License-Identifier: Apache-2.0
"""Attention rows of a decoder layer, recomputed for the few queries that are needed.

The layer's own norm, projections and rotary angles are used, in float32 from the logits on, one layer at a time: the model keeps
SDPA or FlashAttention and no L x L map is ever made. B prompts, R query rows, P slots held before this call, q fed in it,
S = P + q.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..kernels import dispatch


@dataclass(frozen=True, eq=False)
class LayerInput:
    """What a decoder layer was given: enough to recompute any of its attention rows.

    Args:
        layer: the decoder layer.
        index: its number.
        hidden: (B, q, D) before the input norm.
        cos, sin: (B or 1, q, d) rotary angles.
        valid: (B, P + q) bool, slots that are tokens.
        cache: the KV cache, or None.
        updated: the layer's attention has run, so that the cache holds what was fed as well.
        mask: (B, 1, q, S or more) the layer's own mask, where it lets some tokens see later ones; None: causal.
    """

    layer: nn.Module
    index: int
    hidden: Tensor
    cos: Tensor
    sin: Tensor
    valid: Tensor
    cache: Any = None
    updated: bool = False
    mask: Tensor | None = None

    @property
    def past(self) -> int:
        return self.valid.shape[1] - self.hidden.shape[1]

    @property
    def window(self) -> int | None:
        """Width of the sliding window, None for full attention."""
        attention = self.layer.self_attn
        kinds = getattr(attention.config, "layer_types", None)
        if kinds is not None and kinds[self.index] == "full_attention":
            return None
        window = getattr(attention, "sliding_window", None)
        return window if window is not None or kinds is not None else getattr(attention.config, "sliding_window", None)

    def normed(self, rows: Tensor | None = None) -> Tensor:
        """(B, R or q, D) input of the projections."""
        hidden = self.hidden if rows is None else dispatch.gather_rows([self.hidden], rows)[0]
        return self.layer.input_layernorm(hidden)

    def queries(self, rows: Tensor) -> Tensor:
        """(B, H, R, d) rotated queries of the rows (B, R), which count from the first token fed."""
        cos, sin = dispatch.gather_rows([angle.expand(rows.shape[0], -1, -1) for angle in (self.cos, self.sin)], rows)
        return rotate(self._heads("q", self.normed(rows)), cos, sin)

    def keys(self) -> Tensor:
        """(B, Hk, S, d) rotated keys, earlier slots taken from the cache, all of them where the layer has filled it already."""
        held = self._filled("keys")
        if held is not None:
            return held
        fed = rotate(self._heads("k", self.normed()), self.cos, self.sin)
        return fed if self.past == 0 else torch.cat([self._cached("keys"), fed], dim=2)

    def values(self) -> Tensor:
        """(B, Hk, S, d) values."""
        held = self._filled("values")
        if held is not None:
            return held
        fed = self._heads("v", self.normed())
        return fed if self.past == 0 else torch.cat([self._cached("values"), fed], dim=2)

    def _filled(self, kind: str) -> Tensor | None:
        """What the cache holds of all S slots after the layer has run; None where it does not (no cache, a sliding window)."""
        slots = self.valid.shape[1]
        held = getattr(self.cache.layers[self.index], kind, None) if self.updated and self.window is None else None
        return None if held is None or held.shape[2] < slots else held[:, :, :slots]

    def _heads(self, kind: str, x: Tensor) -> Tensor:
        attention = self.layer.self_attn
        try:
            projection = getattr(attention, f"{kind}_proj")
        except AttributeError as error:
            raise UnsupportedError(
                f"{type(attention).__name__} has no {kind}_proj; its attention rows cannot be recomputed"
            ) from error
        states = projection(x).unflatten(-1, (-1, attention.head_dim))
        norm = getattr(attention, f"{kind}_norm", None)  # Qwen3 and Gemma3 normalise heads before rotating them
        return (states if norm is None else norm(states)).transpose(1, 2)

    def _cached(self, kind: str) -> Tensor:
        held = getattr(self.cache.layers[self.index], kind, None)
        if held is None or held.shape[2] < self.past:
            raise UnsupportedError(
                f"layer {self.index} holds {0 if held is None else held.shape[2]} of the {self.past} earlier slots "
                "(a sliding window forgets them), so its attention rows cannot be recomputed after the prompt; "
                "use shorter prompts, or a method that reads no attention of the language model, e.g. 'fastervlm@64'"
            )
        return held[:, :, : self.past]

    def logits(self, rows: Tensor) -> Tensor:
        """(B, H, R, S) scaled logits in float32, -inf where a row may not look."""
        queries, keys = self.queries(rows).float(), self.keys().float()
        groups = queries.shape[1] // keys.shape[1]  # query heads that share a key head
        folded = queries.unflatten(1, (-1, groups)).flatten(2, 3) @ keys.transpose(2, 3)  # (B, Hk, groups * R, S)
        logits = folded.unflatten(2, (groups, -1)).flatten(1, 2) * self.layer.self_attn.scaling
        softcap = getattr(self.layer.self_attn, "attn_logit_softcapping", None)
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        return logits.masked_fill(~self.visible(rows)[:, None], -torch.inf)

    def visible(self, rows: Tensor) -> Tensor:
        """(B, R, S) bool: slots that a row may attend to."""
        if self.mask is not None:
            allowed = self.mask if self.mask.dtype == torch.bool else self.mask == 0
            allowed = allowed[:, 0, :, : self.valid.shape[1]].expand(rows.shape[0], -1, -1)
            return allowed.gather(1, rows[..., None].expand(-1, -1, allowed.shape[-1]))
        at = (rows + self.past)[..., None]  # (B, R, 1)
        slots = torch.arange(self.valid.shape[1], device=rows.device)
        seen = (slots <= at) & self.valid[:, None]
        return seen if self.window is None else seen & (slots > at - self.window)

    def weigh(self, weights: Tensor) -> Tensor:
        """(B, R, H * d) values summed with weights (B, H, R, S), in float32."""
        values = self.values().float()
        folded = weights.unflatten(1, (values.shape[1], -1)).flatten(2, 3) @ values  # (B, Hk, groups * R, d)
        return folded.unflatten(2, (-1, weights.shape[2])).flatten(1, 2).transpose(1, 2).flatten(2)

    def attention(self, rows: Tensor) -> Tensor:
        """(B, H, R, S) softmaxed attention of the rows in float32."""
        return self.logits(rows).softmax(dim=-1)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (B, H, n, d) states, halves paired; angles narrower than a head rotate its first part only."""
    cos, sin = cos[:, None], sin[:, None]
    turned, rest = states[..., : cos.shape[-1]], states[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)
