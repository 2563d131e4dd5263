# SPDX-License-Identifier: Apache-2.0
"""An attention call whose logits are given: for recorded maps without the queries and keys behind them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlmprune.hooks.attention_call import AttentionCall


def call_with_logits(logits: Tensor, visible: Tensor, values: Tensor) -> AttentionCall:
    """The call of H heads with logits (H, R, S), visible keys (R, S) and values (H, S, d); one prompt."""
    heads, _, slots = logits.shape
    keys = torch.eye(slots, dtype=logits.dtype).expand(1, heads, -1, -1)  # queries are their own logits
    return AttentionCall(nn.Module(), logits[None], keys, values[None], visible[None, None], {"scaling": 1.0})


def call_with_maps(maps: Tensor, values: Tensor | None = None) -> AttentionCall:
    """The call of H heads with causal attention maps (H, L, L)."""
    visible = torch.ones(maps.shape[1:], dtype=torch.bool).tril()
    logits = maps.double().clamp_min(1e-30).log()
    values = torch.zeros(*maps.shape[:2], 1) if values is None else values
    return call_with_logits(logits, visible, values.double())
