# SPDX-License-Identifier: Apache-2.0
"""Projectors as models have them, small and with random weights."""

from __future__ import annotations

import torch
from torch import nn


def mlp(
    width: int = 12,
    hidden: int = 20,
    out: int = 16,
    norm: bool = False,
    bias: bool = True,
    act: nn.Module | None = None,
    seed: int = 0,
) -> nn.Sequential:
    """[LayerNorm] Linear act Linear with weights under which tokens differ."""
    torch.manual_seed(seed)
    first, second = nn.Linear(width, hidden, bias=bias), nn.Linear(hidden, out, bias=bias)
    layers: list[nn.Module] = [first, act or nn.GELU(), second]
    if norm:
        before = nn.LayerNorm(width)
        nn.init.normal_(before.weight, 1, 0.3)
        nn.init.normal_(before.bias, 0, 0.5)
        layers.insert(0, before)
    for layer in (first, second):
        nn.init.normal_(layer.weight, std=1.5 / layer.in_features**0.5)
    return nn.Sequential(*layers).requires_grad_(False)
