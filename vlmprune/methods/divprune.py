# SPDX-License-Identifier: Apache-2.0
"""DivPrune: keep the tokens that are farthest from each other.

Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", arXiv:2503.02175.
Max-min diversity: maximise over subsets S of size k the smallest cosine distance within S, by farthest-point
greedy.

Deviations: picked tokens are masked, as in the paper's pseudo-code (the official code can pick one twice when
tokens coincide); float32 instead of the model's dtype; the budget is floored where the official code rounds;
newline embeddings take no part.
Provenance: the official code is CC BY-NC 4.0 and was not read; written from a text description alone.
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
        order (B, k) int64 in the order of picking, and distance (B, k) of each pick to the nearest earlier
        one; for the first pick, which is the token whose nearest neighbour is farthest, to that neighbour.
    """
    n = features.shape[1]
    if not 1 <= k <= n:
        raise InvariantError(
            f"cannot pick {k} of features of shape {tuple(features.shape)}; expected (B, N, D) and 1 <= k <= "
            "N"
        )
    unit = torch.nn.functional.normalize(
        features.float(), dim=-1
    )  # a zero vector stays zero: distance 1 to all
    order, distance = dispatch.greedy_maxmin_features(unit, k, first="nn")
    return order.long(), distance


@register("divprune")
@dataclass(frozen=True)
class DivPrune(Method):
    """Keeps the k tokens, as the language model would read them, that a farthest-point walk visits first.

    No attention and no text are needed. Walks with a larger budget continue the same walk, so kept sets are
    nested.

    Example:
        ``vlmprune.select("divprune", keep=64, features=features)``
    """

    needs: ClassVar[tuple[What, ...]] = ("features",)
    paper: ClassVar[str] = "arXiv:2503.02175"
    licence: ClassVar[str] = "CC BY-NC 4.0, not read"

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        order, distance = greedy_maxmin(tokens.need("features"), k)
        if not bool(torch.isfinite(distance).all()):
            raise InvariantError(
                "divprune: distances between features are not finite. Check the features for NaN and overflow"
            )
        return order
