# SPDX-License-Identifier: Apache-2.0
"""VHR: heads whose output changes with the picture are made louder.

The text of the prompt is read once without its pictures. With o_t[h] and o_v[h] the output of head h of a
layer at the last token of the prompt without and with the picture,

    VHD[h] = |o_v[h] - o_t[h]|,   TA[h] = |o_t[h]|^2
    VHD[h] = 0 where VHD[h] > mean + std of VHD and TA[h] > mean + std of TA
    the output of all h with VHD[h] > median of VHD is multiplied by alpha, in all rows

before it is projected, layer by layer, so that o_v is that of states which earlier layers changed already.
The heads stay the same while decoding. Those that are loud without the picture as well are left out by the
second line.

Deviations: layers are scaled to the depth of the model; published are layer 1 and the last 14 of 32.
``variant="squared_guarded"`` is a public port that claims the behaviour of the released code: squared
distances, and the second line only where their standard deviation exceeds 1.
Provenance: He et al., "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence",
arXiv:2412.13949 (ACL 2025); written from the equations of the paper; the official code could not be had.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check_number, one_of
from ..core.method import Method, Rows, SlotName, What
from ..errors import SpecError
from ..registry import register


@register("vhr")
@dataclass(frozen=True)
class VHR(Method):
    """Multiplies the output of the heads that react to the picture; prunes nothing.

    Args:
        alpha: factor of their output; 1 changes nothing, and 4 breaks sentences according to the paper.
        layers: decoder layers, negative ones counted from the last; None: layer 1 and the last 7 of 16.
        variant: "euclidean", or "squared_guarded".
    """

    alpha: float = 2.0
    layers: tuple[int, ...] | None = None
    variant: str = "euclidean"

    slot: ClassVar[SlotName] = "attention"
    budgeted: ClassVar[bool] = False
    query_aware: ClassVar[bool] = True
    rows: ClassVar[Rows] = "all"
    needs: ClassVar[tuple[What, ...]] = ()
    paper: ClassVar[str] = "arXiv:2412.13949"

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, least=0)
        one_of("variant", self.variant, ("euclidean", "squared_guarded"))

    def acts_on(self, depth: int) -> list[int]:
        if self.layers is None:
            # published for 32 layers: layer 1 and the last 14
            last = max(1, round(depth * 7 / 16))
            return sorted({min(1, depth - 1), *range(depth - last, depth)})
        if not self.layers or not all(-depth <= layer < depth for layer in self.layers):
            raise SpecError(
                f"layers={list(self.layers)}; expected one or more decoder layers of -{depth}..{depth - 1}"
            )
        return sorted({layer % depth for layer in self.layers})  # -1 is the last layer

    def divergence(self, with_image: Tensor, without: Tensor) -> Tensor:
        """(B, H) what the picture changes in the output of each head, both (B, H, d)."""
        squared = (with_image - without).square().sum(dim=-1)
        return squared if self.variant == "squared_guarded" else squared.sqrt()

    def outliers(self, divergence: Tensor, without: Tensor) -> Tensor:
        """(B, H) bool, heads that are loud without the picture too: divergence (B, H), output (B, H, d)."""
        # second line of the formula: what the picture changes is much, but the head is loud without it, too
        loud = above_spread(divergence) & above_spread(activation(without))
        if self.variant == "squared_guarded":
            loud = loud & (divergence.std(dim=-1, keepdim=True) > 1)
        return loud

    def chosen(self, divergence: Tensor, outliers: Tensor) -> Tensor:
        """(B, H) bool, the heads above the median once outliers count as 0."""
        # before the median is taken, so that they count in it as 0
        left = divergence.masked_fill(outliers, 0.0)
        return left > left.median(dim=-1, keepdim=True).values

    def head_scales(self, with_image: Tensor, without: Tensor, layer: int) -> Tensor:
        """(B, H) alpha for the chosen heads, 1 for the others."""
        divergence = self.divergence(with_image, without)
        chosen = self.chosen(divergence, self.outliers(divergence, without))
        return torch.where(chosen, self.alpha, 1.0)


def activation(without: Tensor) -> Tensor:
    """(B, H) squared length of the output (B, H, d) of each head."""
    return without.square().sum(dim=-1)


def above_spread(values: Tensor) -> Tensor:
    """(B, H) bool, values more than one standard deviation (of n - 1) above the mean of their row (B, H)."""
    return values > values.mean(dim=-1, keepdim=True) + values.std(dim=-1, keepdim=True)
