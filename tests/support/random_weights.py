# SPDX-License-Identifier: Apache-2.0
"""Random weights of trained methods, for tiny models of any family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmprune.core.weights import Shapes, backbone_of, write_weights
from vlmprune.methods.rcp import shapes_of
from vlmprune.methods.textmonkey import SHAPES as BLOCK
from vlmprune.methods.visionselector import SHAPES as SCORER

# axes by letter, but for D, the width of the language model; N is not the number of tokens of a picture
SIZES = {"h": 16, "m": 24, "a": 16, "2a": 32, "i": 20, "d": 8, "q": 3, "r": 6, "e": 4, "N": 30}
RCP: dict[str, Any] = {
    "layers": [1, 2],
    "repairs": [[2, 1], [3, 2]],
    "heads": 2,
    "shares": [0.5, 0.25],
}
TRAINED = ("visionselector", "textmonkey", "rcp", "dyvte")


def drawn(shapes: Shapes, width: int, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of these shapes for a language model of a width."""
    draw, sizes = torch.Generator().manual_seed(seed), {**SIZES, "D": width}
    return {
        name: torch.randn([int(axis) if axis.isdigit() else sizes[axis] for axis in axes], generator=draw)
        for name, axes in shapes.items()
    }


def gates(width: int, layers: tuple[int, ...] = (0, 1, 2), seed: int = 0) -> dict[str, Tensor]:
    """Random gates of DyVTE."""
    draw, found = torch.Generator().manual_seed(seed), {}
    for gate in layers:
        found[f"gate.{gate}.w1"] = torch.randn(16, 2 * width, generator=draw) / (2 * width) ** 0.5
        found[f"gate.{gate}.w2"] = torch.randn(2, 16, generator=draw)
    return found


def spec_with_weights(method: str, folder: Path, config: Any, budget: str = "") -> str:
    """Write random weights of a method for the model of a config; the spec that reads them."""
    backbone = backbone_of(config)
    width = backbone["hidden_size"]
    tensors, facts = {
        "visionselector": lambda: (drawn(SCORER, width), {}),
        "textmonkey": lambda: (drawn(BLOCK, width), {"heads": 4}),
        "rcp": lambda: (drawn(shapes_of(RCP), width), RCP),
        "dyvte": lambda: (gates(width), {"gates": [0, 1, 2]}),
    }[method]()
    write_weights(folder, method, tensors, {"backbone": backbone, **facts})
    return f"{method}(weights={str(folder)!r}){budget}"
