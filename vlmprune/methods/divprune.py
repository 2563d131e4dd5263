# SPDX-License-Identifier: Apache-2.0
"""DivPrune: keep the tokens that are farthest from each other.

A kept set without near-duplicates covers the picture. The set whose smallest pairwise cosine distance is
largest is approached by a greedy walk from the farthest point to the next.

    d(i, j) = 1 - cos(x_i, x_j)
    first   = argmax_i min_{j != i} d(i, j)
    next    = argmax_{i not in S} min_{j in S} d(i, j)

with x the tokens as the language model would read them and S those picked so far.

Deviations: picked tokens are masked, as in the paper's pseudo-code (the official code can pick one twice when
tokens coincide); float32 instead of the model's dtype; the budget is floored where the official code rounds;
newline embeddings take no part.
Provenance: Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
arXiv:2503.02175; written from a text description; the official code (CC BY-NC 4.0) was not read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.method import Method, What
from ..core.tokens import VisualTokens
from ..errors import InvariantError
from ..kernels import dispatch
from ..registry import register


@torch.no_grad()
def greedy_maxmin(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Farthest-point greedy on cosine distance.

    Args:
        features: (B, N, D).
        k: number of picks.

    Returns:
        order (B, k) int64 of picking, and distance (B, k) of each pick to the nearest earlier one; of the
        first pick to its nearest neighbour.
    """
    if not 1 <= k <= features.shape[1]:
        raise InvariantError(
            f"cannot pick {k} of features {tuple(features.shape)}; expected (B, N, D) and 1 <= k <= N"
        )
    # a zero vector stays zero: distance 1 to all
    x = torch.nn.functional.normalize(features.float(), dim=-1)
    # "nn": the first pick is the token that is farthest from its nearest neighbour
    order, distance = dispatch.greedy_maxmin_features(x, k, first="nn")
    return order.long(), distance


@register("divprune")
@dataclass(frozen=True)
class DivPrune(Method):
    """Keeps the k tokens that a farthest-point walk over the features visits first.

    Neither attention nor text is needed. A larger budget continues the same walk, so kept sets are nested.

    Example:
        ``vlmprune.select("divprune", keep=64, features=features)``
    """

    needs: ClassVar[tuple[What, ...]] = ("features",)
    paper: ClassVar[str] = "arXiv:2503.02175"
    licence: ClassVar[str] = "CC BY-NC 4.0, not read"

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        order, distance = greedy_maxmin(tokens.need("features"), k)
        tokens.require_finite(
            distance,
            lambda: InvariantError(
                "divprune: distances between features are not finite. Check the features for NaN and overflow"
            ),
        )
        return order
