# SPDX-License-Identifier: Apache-2.0
"""MMR: re-rank any method by maximal marginal relevance, the rule of IDPruner; a wrapper.

Carbonell and Goldstein, "The Use of MMR, Diversity-Based Reranking", SIGIR 1998; for visual tokens in
IDPruner, over a trained importance. With imp in 0 .. 1 and S the cosines of the tokens, the first pick has
the largest imp; every later one the largest lambda imp_i - (1 - lambda) max over picks j of S_ij.

Deviations: the importance is that of any method that scores tokens, so that nothing has to be trained; the
lower index wins ties; pictures are ranked one by one, there all pictures of a sample together.
Provenance: written from a description of the official code (AngelSlim, commit 67394ce, Apache-2.0); no code
copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..checks import check_int, check_number, one_of
from ..core.combine import act_as
from ..core.deferred import all_finite
from ..core.method import Method, Need, needs_of
from ..core.select import best_first, rows_at
from ..core.tokens import VisualTokens
from ..errors import InvariantError, SpecError
from ..registry import register
from .pairs import unit


def minmax(scores: Tensor) -> Tensor:
    """(B, N) scores s stretched to 0 .. 1: (s - min) / (max - min + 1e-6)."""
    low, high = scores.amin(dim=1, keepdim=True), scores.amax(dim=1, keepdim=True)
    return (scores - low) / (high - low + 1e-6)


def share_below(scores: Tensor) -> Tensor:
    """(B, N) share of the other tokens that score less; equal scores stay equal."""
    ordered = scores.sort(dim=1).values
    # from the left: equal scores find the same place
    return torch.searchsorted(ordered, scores.contiguous()).float() / max(1, scores.shape[1] - 1)


@torch.no_grad()
def marginal_relevance(
    importance: Tensor, features: Tensor, k: int, balance: float = 0.5, parallel: int = 1
) -> Tensor:
    """Order (B, k) int64 of k picks, ``parallel`` per step without looking at each other.

    Args:
        importance: (B, N), imp.
        features: (B, N, D).
        k: number of picks.
        balance: lambda.
    """
    x = unit(features)
    value, near = importance, None  # largest cosine (B, N) to what is picked
    taken = torch.zeros_like(importance, dtype=torch.bool)
    order: list[Tensor] = []
    for start in range(0, k, parallel):
        # the first pick has the largest imp
        picks = best_first(value.masked_fill(taken, -torch.inf), min(parallel, k - start))  # (B, p)
        order.append(picks)
        taken = taken.scatter(1, picks, True)
        like = (rows_at(x, picks) @ x.transpose(1, 2)).amax(dim=1)  # (B, p, N) -> (B, N)
        # only the newest picks are compared: what the earlier ones said is in ``near``
        near = like if near is None else torch.maximum(near, like)
        # lambda imp - (1 - lambda) max over the picks j of S_ij
        value = balance * importance - (1 - balance) * near
    return torch.cat(order, dim=1)


@register("mmr")
@dataclass(frozen=True)
class MMR(Method):
    """Takes the scores of the method that follows and picks tokens unlike those before: ``mmr+fastervlm@64``.

    Args:
        balance: lambda: 1 ranks by the scores alone, 0 by distance alone after the first pick.
        importance: "minmax" of the scores, or "rank": the share of tokens that score less, where a few scores
            tower above all others, as those of attention do, and where a method only ranks at each budget.
        parallel: picks per step that do not look at each other; fewer steps, less diversity.
    """

    inner: Method
    balance: float = 0.5
    importance: Literal["minmax", "rank"] = "minmax"
    parallel: int = 1

    wraps: ClassVar[bool] = True
    paper: ClassVar[str] = "IDPruner"
    licence: ClassVar[str] = "Apache-2.0, with parts of third parties"

    def __post_init__(self) -> None:
        check_number("balance", self.balance, 0, 1)
        one_of("importance", self.importance, ("minmax", "rank"))
        check_int("parallel", self.parallel, 1)
        # a method that chooses a set may still say in which order it takes tokens
        ranks = type(self.inner).ranking is not Method.ranking
        if self.inner.slot != "before_lm" or not (self._scores or ranks):
            raise SpecError(
                f"mmr re-ranks scores given before the language model, and {self.inner.name} has none; wrap "
                "a method that has, as in mmr+fastervlm@64"
            )
        if self.importance == "minmax" and not self._scores:
            raise SpecError(
                f"{self.inner.name} says which tokens come first at a budget, not by how much, so there is "
                f"nothing to stretch to 0 .. 1; write mmr(importance=rank)+{self.inner.name}@64"
            )
        # it selects, whatever the method inside does
        act_as(self, self.inner, but=("kind", "needs", "nested"))
        object.__setattr__(self, "needs", tuple(dict.fromkeys((*needs_of(self.inner), Need("features")))))
        object.__setattr__(self, "nested", self.parallel == 1 and self._scores)

    @property
    def _scores(self) -> bool:
        """Whether the inner method has scores that are the same at every budget."""
        return type(self.inner).score is not Method.score

    def check_model(self, config: Any) -> None:
        self.inner.check_model(config)

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        given = self.inner.score(tokens) if self._scores else self.inner.ranking(tokens, k)
        scores, features = given.float().to(tokens.device), tokens.need("features")
        tokens.require(
            all_finite(scores) & all_finite(features),
            lambda: InvariantError(
                f"mmr: scores of {self.inner.name} or features are not finite. Check them for NaN and "
                "overflow"
            ),
        )
        importance = minmax(scores) if self.importance == "minmax" else share_below(scores)
        return marginal_relevance(importance, features, k, self.balance, self.parallel)
