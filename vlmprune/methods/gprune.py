# SPDX-License-Identifier: Apache-2.0
"""G-Prune: norms of tokens spread over a graph of like tokens; those that gather most per edge are kept.

Foreground and background both matter, so representatives are kept and not favourites. With u_i the token x_i
of length one and an edge from i to j where u_i . u_j >= 0.5 (i = j included):

    A_ij = softmax over the edges of i of u_i . u_j / 0.03
    score_j = (|x| A^5)_j / edges of j

A is close to the identity unless tokens are nearly equal: the limit, which ``iterations=0`` gives, is the
norm over the degree.

Deviations: edges are counted as such, where the official code counts positive weights, which is the same
above a temperature of 0.006; a token of zeros has no edge and scores 0, there it is one of all N. The vector
is multiplied five times, not the matrix. Tiled pictures form one graph; the official code has one for the
base tile and one for the rest (``@K/crop`` makes one per tile).
Provenance: arXiv:2501.02268; written from a description of the abstract and of the official code (commit
762c637, no licence file); no code copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..checks import check_int, check_number
from ..core.method import Method, What
from ..core.tokens import VisualTokens
from ..registry import register

_HELD = 4096  # tokens up to which the graph is held; above, it is made again in every round
_ROWS_AT_ONCE = 1024
_NO_EDGE = -5000.0  # of a cosine


def graph(u: Tensor, threshold: float, temperature: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of A (B, r, N) and the degrees (B, r) of their tokens, some at a time, of tokens (B, N, D)."""
    for rows in u.split(_ROWS_AT_ONCE, dim=1):
        s = rows @ u.transpose(1, 2)  # (B, r, N)
        edge = s >= threshold
        # finite, so that a row without any edge becomes uniform and not NaN
        yield (s.masked_fill(~edge, _NO_EDGE) / temperature).softmax(dim=-1), edge.sum(dim=-1)


@register("gprune")
@dataclass(frozen=True)
class GPrune(Method):
    """Ranks tokens by what reaches them over a graph of like tokens, divided by their degree.

    Args:
        threshold: cosine from which on two tokens have an edge.
        temperature: of the softmax over edges.
        iterations: rounds of spreading; 0: norm over degree.
    """

    threshold: float = 0.5
    temperature: float = 0.03
    iterations: int = 5

    needs: ClassVar[tuple[What, ...]] = ("features",)
    paper: ClassVar[str] = "arXiv:2501.02268"
    licence: ClassVar[str] = "none given"

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, -1, 1)
        check_number("temperature", self.temperature, 1e-4, 1e4)
        check_int("iterations", self.iterations, 0)

    def score(self, tokens: VisualTokens) -> Tensor:
        x = tokens.need("features").float()  # (B, N, D)
        u, r = normalize(x, dim=-1), x.norm(dim=-1)  # (B, N)
        held = list(graph(u, self.threshold, self.temperature)) if x.shape[1] <= _HELD else None
        degree = torch.cat([count for _, count in held or graph(u, self.threshold, self.temperature)], dim=1)
        # r A^5 by five products of a vector with the graph, never a power of A
        for _ in range(self.iterations):
            spread = torch.zeros_like(r)
            parts = held or graph(u, self.threshold, self.temperature)
            for own, (a, _) in zip(r.split(_ROWS_AT_ONCE, dim=1), parts, strict=True):
                spread = spread + (own[:, None] @ a)[:, 0]  # row i gives to column j
            r = spread
        return torch.where(degree > 0, r / degree.clamp_min(1), 0.0)
