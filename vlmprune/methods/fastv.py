# SPDX-License-Identifier: Apache-2.0
"""FastV: one cut after the first decoder layers, by the attention of the last prompt token.

Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", arXiv:2403.06764 (ECCV 2024).

Deviations: scores in float32; ties go to the lower index; ranked per image and per sample (the official code
ranks sample 0 and applies it to all); the true image span is used (the official scripts start it one token
late on LLaVA-1.5); padding keeps its mask; fractions are rounded down, see ``official_keep``.
Provenance: written from a description of paper and official code (commit d165972, no licence file); no code
copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..checks import one_of
from ..core.method import CutPoint, Method, What
from ..core.tokens import VisualTokens
from ..errors import SpecError
from ..registry import register


@register("fastv")
@dataclass(frozen=True)
class FastV(Method):
    """Layers 0 .. layer-1 read every token, all later ones the ``keep`` tokens that the last prompt token
    attends to most.

    Args:
        layer: first layer that reads the shortened sequence; the row of layer - 1 ranks (K = 2 in the paper).
    """

    layer: int = 2

    slot: ClassVar[str] = "inside_lm"
    query_aware: ClassVar[bool] = True
    positions: ClassVar[str] = "original"
    needs: ClassVar[tuple[What, ...]] = ("text_attention",)
    paper: ClassVar[str] = "arXiv:2403.06764"
    licence: ClassVar[str] = "none stated"

    def __post_init__(self) -> None:
        if not isinstance(self.layer, int) or isinstance(self.layer, bool) or self.layer < 1:
            raise SpecError(
                f"layer={self.layer!r}; expected a decoder layer from 1 on: nothing attends before layer 0"
            )

    def cuts(self, depth: int, budget: Any, count: int) -> tuple[CutPoint, ...]:
        if budget is None:
            raise SpecError("fastv needs a budget: fastv@288 (tokens that go on) or fastv@0.5 (fraction)")
        if self.layer >= depth:
            raise SpecError(
                f"layer={self.layer} but the language model has layers 0..{depth - 1}; choose a smaller one"
            )
        return (CutPoint(self.layer, budget.count(count), source=self.layer - 1),)

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.need("text_attention")[:, :, -1].mean(dim=1)  # (B, H, R, N) -> (B, N)


def official_keep(count: int, drop: float, rounding: str = "round") -> int:
    """Tokens that the official code keeps of ``count`` at a drop share; "round" is its Hugging Face port,
    halves to even.

    A budget here rounds down and keeps at least one token: to reproduce a run, give what this returns as
    ``keep``.

    Example:
        >>> official_keep(576, 0.778)
        128
    """
    one_of("rounding", rounding, ("round", "truncate"))
    left = count * (1 - drop)
    return round(left) if rounding == "round" else int(left)
