# SPDX-License-Identifier: Apache-2.0
"""VisPruner: one half of the budget by the attention of [CLS], the other by taking out near-duplicates.

[CLS] points at the main objects but leaves context out, and its favourites repeat each other. With a the
attention of [CLS], mean over heads, T tokens and share r:

    important = the int(T r) patches with the highest a
    residual  = all others, best a first
    while more than T - int(T r) are left: of those at even places of the list, take out the 8 whose largest
        cosine with any at an odd place is highest; what is left of them, in that order, comes before the
        others

Features are those before the projector. The list depends on odd and even places, so that the second half is
not the same in half precision, where scores tie.

Deviations: the even places may be one more than the odd ones, or fewer than 8 (the official code raises
there, for half of all budgets); the norm of a zero feature is clamped. ``residual="raster"`` keeps the list
in raster order, as AngelSlim does. ``cls="mean"`` is ours, for towers without [CLS]; patches that a projector
merges to one token are compared side by side.
Provenance: arXiv:2412.01818v2 (v1 of that id is FasterVLM); written from a description of the abstract and
the official code (commit aefa01a, Apache-2.0); no code copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..checks import check_int, check_number, one_of
from ..core.budget import share_of
from ..core.method import Method, Need, What
from ..core.select import ranked
from ..core.tokens import VisualTokens
from ..registry import register
from .pairs import check_pairs
from .tower import check_tower_options


def without_twins(features: Tensor, residual: Tensor, k: int, step: int = 8, raster: bool = False) -> Tensor:
    """(B, k) what is left of the list ``residual`` (B, R) of tokens after its near-duplicates were taken out.

    Args:
        features: (B, N, C) that cosines are taken of.
        k: how long the list shall be.
        step: tokens that leave in one round.
        raster: sort the list by place before every round.
    """
    batch, n = features.shape[:2]
    unit = normalize(features.float(), dim=-1)
    # all pairs once; every round looks its own up
    cosine = (unit @ unit.transpose(1, 2)).flatten(1)  # (B, N * N)
    while k and residual.shape[1] > k:
        if raster:
            residual = residual.sort(dim=1).values
        # those at even places may leave, by what they have in common with those at odd ones
        even, odd = residual[:, ::2], residual[:, 1::2]
        pairs = (even[..., None] * n + odd[:, None]).flatten(1)  # (B, R / 2 * R / 2)
        likeness = cosine.gather(1, pairs).view(batch, even.shape[1], -1).amax(dim=2)
        gone = min(step, residual.shape[1] - k)
        # the order is a part of the method: it decides the even and odd places of the next round
        residual = torch.cat([even.gather(1, ranked(likeness)[:, gone:]), odd], dim=1)
    return residual[:, :k]


def side_by_side(encoded: Tensor, count: int) -> Tensor:
    """(B, N, r * C) features of tokens that r patches each are merged to, from (B, r * N, C)."""
    return encoded.unflatten(1, (count, -1)).flatten(2)


@register("vispruner")
@dataclass(frozen=True)
class VisPruner(Method):
    """Keeps the patches that [CLS] attends to, and of the others those without a near twin.

    Args:
        important: share of the budget for the most attended patches.
        step: patches that are taken out in one round.
        residual: "score": the list of the others starts by attention, as published; "raster": it is sorted by
            place before every round.
        cls: "token", or "mean": the attention a patch receives from all patches, for towers without [CLS].
        layer: index into the hidden states of the tower, such as -2; None: the layer the model takes its
            features from.
        anyres: "unpad", or "spatial", the authors' LLaVA-NeXT layout (budget per raw tile, no newline).
    """

    important: float = 0.5
    step: int = 8
    residual: str = "score"
    cls: str = "token"
    layer: int | None = None
    anyres: str = "unpad"

    nested: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv:2412.01818v2"
    licence: ClassVar[str] = "Apache-2.0"

    def __post_init__(self) -> None:
        check_number("important", self.important, 0, 1)
        check_int("step", self.step, 1)
        one_of("residual", self.residual, ("score", "raster"))
        check_tower_options(self.cls, self.layer, self.anyres)
        if self.anyres == "spatial":
            object.__setattr__(self, "layout", "spatial")

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        attention: What = "cls_attention" if self.cls == "token" else "received_attention"
        return Need(attention, self.layer), Need("encoder_features")

    def check_unit(self, count: int) -> None:
        check_pairs(self.name, count)

    def attention(self, tokens: VisualTokens) -> Tensor:
        """(B, N) attention that patches are ranked by."""
        if self.cls == "mean":
            return tokens.need("received_attention").float()
        return tokens.need("cls_attention").float().mean(1)  # (B, H, N) -> (B, N)

    def halves(self, tokens: VisualTokens, k: int) -> tuple[Tensor, Tensor]:
        """(B, T_imp) important patches, best first, and (B, T_div) diverse ones as the rounds leave them."""
        order, first = ranked(self.attention(tokens)), share_of(k, self.important)
        features = side_by_side(tokens.need("encoder_features"), tokens.count)
        raster = self.residual == "raster"
        return order[:, :first], without_twins(features, order[:, first:], k - first, self.step, raster)

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        return torch.cat(self.halves(tokens, k), dim=1)
