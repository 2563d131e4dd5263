# SPDX-License-Identifier: Apache-2.0
"""FastV: cut once after the first decoder layers, by the attention of the last prompt token.

Past the first layers image tokens receive little attention. They are ranked once by how much the last token
of the prompt attends to them, and the remaining layers run without the others.

    score_j = 1/H sum_h A[h, q, j]

with A the softmaxed attention of layer K - 1 (counted from 0) over the whole sequence, H heads, q the last
token of the prompt and j an image token.

Deviations: scores in float32; ties go to the lower index; ranked per image and per sample (the official code
ranks sample 0 and applies it to all); the true image span is used (the official scripts start it one token
late on LLaVA-1.5); padding keeps its mask; fractions are rounded down.
Provenance: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", arXiv:2403.06764 (ECCV 2024); written
from a description of paper and official code (commit d165972, no licence file); no code copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..checks import check_int
from ..core.budget import Budget
from ..core.method import CutPoint, Method, Positions, SlotName, What
from ..core.tokens import VisualTokens
from ..errors import SpecError
from ..registry import register


@register("fastv")
@dataclass(frozen=True)
class FastV(Method):
    """Layers from ``layer`` on read only the image tokens that the last prompt token attends to most.

    Args:
        layer: K, the first layer that reads the shorter sequence; layer K - 1 ranks.
    """

    layer: int = 2

    slot: ClassVar[SlotName] = "inside_lm"
    landing: ClassVar[tuple[str, int] | None] = ("layer", 1)
    query_aware: ClassVar[bool] = True
    positions: ClassVar[Positions] = "original"
    needs: ClassVar[tuple[What, ...]] = ("text_attention",)
    paper: ClassVar[str] = "arXiv:2403.06764"
    licence: ClassVar[str] = "none stated"

    def __post_init__(self) -> None:
        check_int("layer", self.layer, least=1)  # nothing attends before layer 0

    def cuts(self, depth: int, budget: Budget | None, count: int) -> tuple[CutPoint, ...]:
        if budget is None:
            raise SpecError("fastv needs a budget: fastv@288 (tokens that go on) or fastv@0.5 (fraction)")
        if self.layer >= depth:
            raise SpecError(
                f"layer={self.layer} but the language model has layers 0..{depth - 1}; choose a smaller one"
            )
        return (CutPoint(self.layer, budget.count(count), source=self.layer - 1),)

    def score(self, tokens: VisualTokens) -> Tensor:
        A = tokens.need("text_attention")[:, :, -1]  # (B, H, R, N) -> (B, H, N), row of q
        return A.mean(dim=1)
