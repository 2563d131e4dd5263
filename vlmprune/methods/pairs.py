# SPDX-License-Identifier: Apache-2.0
"""For methods that compare tokens in pairs: which rows stand for tokens, and how many there may be."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.tokens import VisualTokens
from ..errors import UnsupportedError

LARGEST = 4096  # tokens of which all pairs are held: 64 MB


def patch_rows(tokens: VisualTokens) -> Tensor:
    """(B, N, C) unit rows before the projector; where that merges patches, the tokens (B, N, D)."""
    rows = tokens.need("encoder_features")
    return unit(rows if rows.shape[1] == tokens.count else tokens.need("features"))


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1, in float32 at least; a row of zeros stays one, and is like no other."""
    # cosines that differ in half precision only by rounding would tie
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return torch.nn.functional.normalize(rows, dim=-1, eps=1e-8)


def check_pairs(name: str, count: int) -> None:
    """Raise where a unit has too many tokens to hold what each pair of them has in common."""
    if count > LARGEST:
        raise UnsupportedError(
            f"{name} compares all pairs of the tokens of a unit, at most {LARGEST}; this one has {count}. "
            f"Give each crop or frame a budget of its own, as in {name}@0.25/crop, or use 'cdpruner'"
        )
