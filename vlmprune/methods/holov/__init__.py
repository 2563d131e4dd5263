# SPDX-License-Identifier: Apache-2.0
"""HoloV: share the budget out over crops of the picture, then keep the best tokens of each crop.

The most attended patches crowd into a few regions and repeat each other. A share of the budget for every crop
makes the kept set cover the picture.

    S_ij = z_i . z_j, S_ii = 0     mu_i = sum_j S_ij / (M - 1)     V_i = sum_j (S_ij - mu_i)^2 / (M - 1)
    H_i  = A_i + alpha g V_i       g    = mean(A) / mean(V)        w_c = mean(A)^tau / sum_c mean(A)^tau
    q_c  = floor(k w_c), the heaviest crop gets the rest; what exceeds a crop goes to crops with room
    kept = the q_c largest H of every crop

with A the attention of [CLS], mean over heads, z the tokens at unit length, and means over a crop c of M
tokens. The paper weighs crops by mean(H), which is (1 + alpha) mean(A): the variance cancels out of w. V, H
and q are ``crop_variance``, ``crop_scores`` and ``share_out`` in ``kernels/crops.py``.

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
from typing import ClassVar

import torch
from torch import Tensor

from ...checks import check_int, check_number, one_of
from ...core.method import Method, Need
from ...core.select import top_k_in_groups
from ...core.tokens import VisualTokens
from ...errors import InvariantError
from ...kernels import dispatch
from ...registry import register
from ..tower import attention_need, check_tower_options, patch_attention
from .crops import bands, windows

ATTENTION_SCALE = 1000.0  # of the official code


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
        n, rule = tokens.count, self.paper_rule if self.variant == "paper" else self.official_rule
        crops = min(n, self.crops or max(1, 1024 * n // (576 * k)))
        cut = windows(tokens.need("grids"), crops) if self.variant == "paper" else bands(n, crops)
        members = cut.to(A.device)  # (C, M)
        rank, mass = rule(A, tokens, members)
        tokens.require_finite(
            rank,
            lambda: InvariantError(
                "holov: attention is negative or not finite, or features are not finite. Check for overflow"
            ),
        )
        quota = dispatch.share_out(mass, members, k, self.tau, self.variant)  # (B, C), q
        return top_k_in_groups(rank, members, quota, k)

    def paper_rule(self, A: Tensor, tokens: VisualTokens, members: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, M) H and the (B, C) mean attention, of attention A (B, N) and windows (C, M)."""
        V = dispatch.crop_variance(tokens.need("features"), members)  # (B, C, M)
        return dispatch.crop_scores(A, V, members, 1.0 if self.alpha is None else self.alpha)

    def official_rule(self, A: Tensor, tokens: VisualTokens, members: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, M) A by bands (C, M), which ranks alone, and s (B, C)."""
        by_band, mean = dispatch.crop_scores(A, None, members, alpha=0.0)
        return by_band, official_scores(mean, members, 0.09 if self.alpha is None else self.alpha)


def official_scores(mean: Tensor, members: Tensor, alpha: float = 0.09) -> Tensor:
    """(B, C) crop scores s of the official code from the mean attention (B, C) of crops (C, M)."""
    return mean * torch.where((members >= 0).sum(1) > 1, ATTENTION_SCALE * (1 + alpha), 1.0)
