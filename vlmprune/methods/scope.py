# SPDX-License-Identifier: Apache-2.0
"""SCOPE: keep patches that cover all others, and that the vision encoder finds salient.

"SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs", arXiv:2510.24214.
Salient patches crowd on a few objects. A set S covers the picture by sum over i of max over j in S of
cos(i, j); the patch with the largest gain of coverage times saliency^alpha comes next.

Deviations: float32 (in half precision the order of picks is not defined); lengths are clamped, so that a row
of zeros harms no other; one budget per picture, wherever it stands in a batch; where a projector merges
patches to a token, the tokens themselves are compared; ``cls="mean"`` is ours, for towers without [CLS].
Provenance: written from a description of paper and official code (commit 6bf7306, Apache-2.0); no code
copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..checks import check_number, one_of
from ..core.method import Method, Need
from ..core.tokens import VisualTokens
from ..errors import InvariantError
from ..kernels import dispatch
from ..registry import register
from .pairs import check_pairs, patch_rows
from .tower import check_tower_options

COMBINE = ("product", "sum")


@torch.no_grad()
def cover_salient(unit: Tensor, weight: Tensor, k: int, combine: str = "product") -> tuple[Tensor, Tensor]:
    """Greedy coverage of all patches by k of them.

    Args:
        unit: (B, N, C) rows of unit length.
        weight: (B, N) saliency^alpha, not negative.
        k: number of picks.
        combine: what becomes of the gain of a patch and its weight.

    Returns:
        order (B, k) int64 in the order of picking, and what each pick was worth (B, k).
    """
    # how well patch j covers patch i is their cosine
    order, worth = dispatch.greedy_cover(unit @ unit.transpose(1, 2), k, weight, combine)
    return order.long(), worth


@register("scope")
@dataclass(frozen=True)
class SCOPE(Method):
    """Picks patch after patch the largest product of newly covered picture and attention of [CLS].

    Args:
        alpha: exponent of the saliency: 0 covers only, large ones rank by attention.
        combine: "product", or "sum" of gain and saliency.
        cls: "token", or "mean": the attention a patch receives from all patches, for towers without [CLS].
        layer: index into the hidden states of the tower, such as -2, whose block gives the attention; None:
            the layer the model takes its features from.

    Example:
        ``vlmprune.select("scope", keep=64, cls_attention=attention, encoder_features=patches)``
    """

    alpha: float = 1.0
    combine: Literal["product", "sum"] = "product"
    cls: Literal["token", "mean"] = "token"
    layer: int | None = None

    paper: ClassVar[str] = "arXiv:2510.24214"
    licence: ClassVar[str] = "Apache-2.0"

    def __post_init__(self) -> None:
        check_tower_options(self.cls, self.layer, "unpad")
        one_of("combine", self.combine, COMBINE)
        check_number("alpha", self.alpha, 0, 100)

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        attention = Need("cls_attention" if self.cls == "token" else "received_attention", self.layer)
        return attention, Need("encoder_features"), Need("features")

    def check_unit(self, count: int) -> None:
        check_pairs(self.name, count)

    def saliency(self, tokens: VisualTokens) -> Tensor:
        """(B, N) attention to every patch, added up over heads."""
        if self.cls == "mean":
            return tokens.need("received_attention").float()
        return tokens.need("cls_attention").float().sum(1)  # (B, H, N) -> (B, N)

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        saliency = self.saliency(tokens)
        # false for NaN too. A negative weight would turn the largest gain into the smallest
        tokens.require(
            (saliency >= 0).all(),
            lambda: InvariantError(
                "scope: attention is negative or not a number. Check the tower for overflow"
            ),
        )
        order, worth = cover_salient(patch_rows(tokens), saliency**self.alpha, k, self.combine)
        tokens.require_finite(
            worth,
            lambda: InvariantError("scope: patches are not finite. Check the features for NaN and overflow"),
        )
        return order
