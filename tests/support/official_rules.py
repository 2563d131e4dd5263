# SPDX-License-Identifier: Apache-2.0
"""Budget rules of official code that the package does not offer: what its recorded vectors were made with."""

from __future__ import annotations

import torch
from torch import Tensor


def fastv_keep(count: int, drop: float, rounding: str) -> int:
    """Tokens of ``count`` that FastV keeps; "round", halves to even, is its Hugging Face port."""
    return {"round": round, "truncate": int}[rounding](count * (1 - drop))


def sparsevlm_rank_budget(attention: Tensor, scale: float, bias: float = 0.0) -> tuple[int, int]:
    """(rank, keep) of the first release of SparseVLM, by the rank of the raters' attention (R, N)."""
    rank = int(torch.linalg.matrix_rank(attention.float()))
    return rank, min(int(rank * scale + bias), attention.shape[1] - 1)
