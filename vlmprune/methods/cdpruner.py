# SPDX-License-Identifier: Apache-2.0
"""CDPruner: keep tokens that differ from each other and have to do with the question.

"Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs",
arXiv:2506.10967. A determinantal point process with the kernel L_ij = r_i S_ij r_j, S the cosines of the
tokens and r their relevance; the kept set is its greedy MAP estimate, which starts at the most relevant
token.

Deviations: relevance is the mean cosine of a token with the words of the question, both as the language model
reads them, where the official code has the CLIP text tower, which checkpoints do not contain; relevance is
scaled per picture, there over all pictures of a batch; float32; where the tokens picked so far span all
others, the most relevant ones follow, where the official recursion divides by zero.
Provenance: written from a description of paper and official code (commit 9541616, Apache-2.0); no code
copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..checks import check_number, one_of
from ..core.deferred import all_finite
from ..core.method import Method, Need, Text
from ..core.select import top_k
from ..core.tokens import VisualTokens
from ..errors import InvariantError
from ..kernels import dispatch
from ..registry import register
from .pairs import unit


def likeness(tokens: Tensor, words: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, N) mean over the words (B, M, E) of their cosine with the tokens (B, N, E).

    Args:
        mask: (B, M) bool, words that are real.
    """
    cosines = unit(tokens) @ unit(words).transpose(1, 2)  # (B, N, M)
    if mask is None:
        # without words all relevance is 0, and none is NaN
        return cosines.sum(dim=2) / max(1, words.shape[1])
    real = mask[:, None].to(cosines.dtype)  # (B, 1, M)
    return (cosines * real).sum(dim=2) / real.sum(dim=2).clamp_min(1)


def scaled(relevance: Tensor) -> Tensor:
    """(B, N) relevance stretched to just above 0 .. 1 in every row; all ones where a row is constant."""
    low, high = relevance.amin(dim=1, keepdim=True), relevance.amax(dim=1, keepdim=True)
    constant = high == low
    # just above 0: a relevance of 0 would take the token out of the process for good
    return torch.where(constant, 1.0, (relevance - low + 1e-6) / torch.where(constant, 1.0, high - low))


@torch.no_grad()
def conditional_dpp(features: Tensor, relevance: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Greedy MAP of the process with kernel r_i S_ij r_j, for features (B, N, D) and relevance r (B, N).

    Returns:
        order (B, k) int64 in the order of picking, and by which factor each pick enlarged the determinant (B,
        k).
    """
    order, gain = dispatch.greedy_dpp_features(unit(features), relevance, k)
    return order.long(), gain


@register("cdpruner")
@dataclass(frozen=True)
class CDPruner(Method):
    """Picks token after token the one that enlarges most the determinant of similarity weighted by relevance.

    Args:
        sign: "positive", likeness to the question counts for a token; "negative" against it, as for patches
            and text of CLIP, whose cosines are lower where the question looks.
        theta: from 0 (diversity alone) to below 1: relevance becomes exp(r theta / (2 - 2 theta)); None:
            relevance as it is, the official setting.
        text: "question", what follows the last picture, or "prompt", all words.

    Example:
        ``vlmprune.select("cdpruner", keep=64, features=features, text_embeds=question)``
    """

    sign: Literal["positive", "negative"] = "positive"
    theta: float | None = None
    text: Literal["question", "prompt"] = "question"

    query_aware: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2506.10967"
    licence: ClassVar[str] = "Apache-2.0"

    def __post_init__(self) -> None:
        one_of("sign", self.sign, ("positive", "negative"))
        one_of("text", self.text, get_args(Text))
        if self.theta is not None:
            check_number("theta", self.theta, 0, 0.999)

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        return Need("features"), Need("text_embeds", text=self.text)

    def relevance(self, tokens: VisualTokens) -> Tensor:
        """(B, N) relevance r of every token to the words; all ones without words."""
        features, words = tokens.need("features"), tokens.need("text_embeds")
        return self.weighted(likeness(features, words, tokens.query_mask))

    def weighted(self, likeness: Tensor) -> Tensor:
        """r of the likeness (B, N) of tokens and text."""
        r = scaled(likeness if self.sign == "positive" else -likeness)
        # theta = 0 makes all ones, which is diversity alone; towards 1 the exponent grows without bound
        return r if self.theta is None else (r * (self.theta / (2 - 2 * self.theta))).exp()

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        r = self.relevance(tokens)
        order, gain = conditional_dpp(tokens.need("features"), r, k)
        tokens.require(
            all_finite(r) & all_finite(gain),
            lambda: InvariantError(
                "cdpruner: tokens or words are not finite. Check them for NaN and overflow"
            ),
        )
        # picks that enlarge nothing are no choice: the most relevant of the other tokens stand in their place
        own = torch.where(gain > 0, torch.inf, r.gather(1, order))
        return top_k(r.scatter(1, order, own), k)
