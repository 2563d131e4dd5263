# SPDX-License-Identifier: Apache-2.0
"""HoloV: share the budget out over crops of the picture, then keep the best tokens of each crop.

The most attended patches crowd into a few regions and repeat each other. A share of the budget for every crop
makes the kept set cover the picture.

    S_ij = z_i . z_j, S_ii = 0     mu_i = sum_j S_ij / (M - 1)     V_i = sum_j (S_ij - mu_i)^2 / (M - 1)
    H_i  = A_i + alpha g V_i       g    = mean(A) / mean(V)        w_c = mean(A)^tau / sum_c mean(A)^tau
    q_c  = floor(k w_c), the heaviest crop gets the rest; what exceeds a crop goes to crops with room
    kept = the q_c largest H of every crop

with A the attention of [CLS], mean over heads, z the tokens at unit length, and means over a crop c of M
tokens. The paper weighs crops by mean(H), which is (1 + alpha) mean(A): the variance cancels out of w.

The official code (``variant="official"``) takes bands for crops, ranks by A alone, weighs crops by

    s_c  = 1000 (1 + alpha) mean(A), or A itself for a crop of one token

and gives the heaviest crops one token more each until k are handed out.

Deviations (see the card): what proportional shares leave over goes to crops in order of weight; pruned tokens
are not fetched again inside the language model.
Provenance: Zou et al., "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context
Retention", arXiv:2510.02912; written from a description of paper and official code (commit 1d2e65e,
Apache-2.0); no code copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ...checks import check_int, check_number, one_of
from ...core.deferred import all_finite
from ...core.method import Method, Need
from ...core.select import top_k_in_groups
from ...core.tokens import VisualTokens
from ...errors import InvariantError
from ...registry import register
from ..tower import attention_need, check_tower_options, patch_attention
from .crops import bands, in_crops, sizes_of, windows
from .quotas import EPS, capped, official_quota, paper_quota, sharpened
from .similarity import variance

ATTENTION_SCALE = 1000.0  # of the official code


class Shares(NamedTuple):
    """What a rule says of C crops of at most M tokens."""

    members: Tensor  # (C, M) tokens of every crop, -1 after the last
    rank: Tensor  # (B, C, M) higher is kept first
    weight: Tensor  # (B, C)
    quota: Tensor  # (B, C) sums to k; may exceed a crop


@register("holov")
@dataclass(frozen=True)
class HoloV(Method):
    """Shares the budget out over windows by attention; inside one, attention plus variance decides.

    Args:
        crops: number of windows, at most one per token; None: floor(1024 / k) of 576 tokens.
        alpha: weight of the variance; None: 1 as in the paper, or 0.09 for the official code.
        tau: sharpness; above 1, windows with much attention get more than their share.
        variant: "paper", or "official": horizontal bands, ranked by attention alone.
        cls: "token", or "mean": attention received from all patches, for towers without [CLS].
        layer: index into the hidden states of the tower, such as -2; None: the layer the model reads.
    """

    crops: int | None = None
    alpha: float | None = None
    tau: float = 1.0
    variant: str = "paper"
    cls: str = "token"
    layer: int | None = None

    nested: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv:2510.02912"
    licence: ClassVar[str] = "Apache-2.0"

    def __post_init__(self) -> None:
        check_tower_options(self.cls, self.layer)
        one_of("variant", self.variant, ("paper", "official"))
        check_number("tau", self.tau, least=0)
        if self.crops is not None:
            check_int("crops", self.crops, least=1)
        if self.alpha is not None:
            check_number("alpha", self.alpha, least=0)

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        attention = attention_need(self.cls, self.layer)
        return (attention, Need("features")) if self.variant == "paper" else (attention,)

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        A = patch_attention(tokens, self.cls).mean(dim=1)  # (B, H, N) -> (B, N)
        rule = self.paper_rule if self.variant == "paper" else self.official_rule
        members, rank, w, q = rule(A, tokens, k)
        tokens.require(
            all_finite(rank) & (A >= 0).all(),
            lambda: InvariantError(
                "holov: attention is negative or not finite, or features are not finite. Check for overflow"
            ),
        )
        return top_k_in_groups(rank, members, capped(q, w, sizes_of(members), k), k)

    def paper_rule(self, A: Tensor, tokens: VisualTokens, k: int) -> Shares:
        """Windows, ranked by attention A (B, N) and variance."""
        alpha = 1.0 if self.alpha is None else self.alpha
        members = windows(tokens.need("grids"), self.crops_for(tokens.count, k)).to(A.device)
        M = sizes_of(members)  # (C,)
        A, V = in_crops(A, members), variance(tokens.need("features"), members)  # (B, C, M)
        mean_A, mean_V = A.sum(-1) / M, V.sum(-1) / M  # (B, C)
        g = mean_A / (mean_V + EPS)
        H = A + alpha * V * g[..., None]
        w = sharpened(mean_A, self.tau)
        return Shares(members, H, w, paper_quota(w, k))

    def official_rule(self, A: Tensor, tokens: VisualTokens, k: int) -> Shares:
        """Bands, ranked by attention A (B, N) alone."""
        alpha = 0.09 if self.alpha is None else self.alpha
        members = bands(tokens.count, self.crops_for(tokens.count, k)).to(A.device)
        A = in_crops(A, members)  # (B, C, M)
        w = sharpened(official_scores(A, sizes_of(members), alpha), self.tau)
        return Shares(members, A, w, official_quota(w, k))

    def crops_for(self, n: int, k: int) -> int:
        """C, the number of crops of n tokens."""
        return min(n, self.crops or max(1, 1024 * n // (576 * k)))


def official_scores(A: Tensor, M: Tensor, alpha: float = 0.09) -> Tensor:
    """(B, C) crop scores s of the official code from attention A (B, C, M) in crops of M (C,) tokens."""
    return A.sum(-1) / M * torch.where(M > 1, ATTENTION_SCALE * (1 + alpha), 1.0)
