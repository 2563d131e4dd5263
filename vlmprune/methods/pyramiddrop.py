# SPDX-License-Identifier: Apache-2.0
"""PyramidDrop: cut in stages, each ranked by what the next layer would attend to.

Redundancy of image tokens grows with depth. At each boundary between stages a fixed share of the image tokens
goes on, ranked by the attention of the last token of the prompt.

    A[h, j] = softmax over all keys of (q_h . k_hj / sqrt(d)),   score_j = 1/H sum_h A[h, j]
    kept    = int(N r_s) tokens at stage s

with q and k the rotated projections of the layer after the boundary, q of the last token of the prompt, j an
image token that is still there, N the tokens that the image had and r the shares.

Deviations: grouped-query models repeat their keys (the official code fails there); several images, padding
and batches are ranked per image; sequences are not truncated. ``keep`` is the mean over all layers of the
tokens that are read; without it the paper's shares are used.
Provenance: Xing et al., "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual
Redundancy Reduction", arXiv:2410.17247; written from a description of paper and official code (commit
6444f30, MIT); no code copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from ..checks import check_layers
from ..core.budget import Budget
from ..core.method import CutPoint, Method, Positions, SlotName, What
from ..core.tokens import VisualTokens
from ..errors import SpecError
from ..registry import register


@register("pyramiddrop")
@dataclass(frozen=True)
class PyramidDrop(Method):
    """Keeps ``shares[i]`` of the original tokens from layer ``layers[i]`` on.

    Args:
        layers: where cuts are made; None: a quarter, a half and three quarters of the depth.
        shares: of the original count, decreasing; None: 0.5, 0.25, 0.125, or r, r^2, r^3 that meet ``keep``.
    """

    layers: tuple[int, ...] | None = None
    shares: tuple[float, ...] | None = None

    slot: ClassVar[SlotName] = "inside_lm"
    landing: ClassVar[tuple[str, int] | None] = ("layers", 0)
    query_aware: ClassVar[bool] = True
    nested: ClassVar[bool] = False  # later stages rank with layers that saw other tokens
    positions: ClassVar[Positions] = "compact"
    needs: ClassVar[tuple[What, ...]] = ("text_attention",)
    paper: ClassVar[str] = "arXiv:2410.17247"
    licence: ClassVar[str] = "MIT"

    def __post_init__(self) -> None:
        if self.layers is not None:
            check_layers("layers", self.layers, first=1)
        if self.shares is None:
            return
        if any(not 0 < r <= 1 for r in self.shares) or any(a <= b for a, b in pairwise(self.shares)):
            raise SpecError(
                f"shares={self.shares}; expected decreasing shares of the original tokens, in (0, 1]"
            )
        stages = 3 if self.layers is None else len(self.layers)
        if len(self.shares) != stages:
            raise SpecError(f"shares={self.shares} for {stages} layers; expected one share per layer")

    def cuts(self, depth: int, budget: Budget | None, count: int) -> tuple[CutPoint, ...]:
        if self.layers is None and depth < 4:
            raise SpecError(
                f"a language model of {depth} layers has no quarters to cut at; choose layers=(1,)"
            )
        layers = self.layers or tuple(depth * quarter // 4 for quarter in (1, 2, 3))
        if layers[-1] >= depth:
            raise SpecError(
                f"layers={layers} but the language model has layers 0..{depth - 1}; choose smaller ones"
            )
        if self.shares is not None and budget is not None:
            raise SpecError(f"shares={self.shares} set the budget already; drop '@{budget}' or the shares")
        mean = None if budget is None else budget.count(count) / count
        r = self.shares or geometric_shares(layers, depth, mean)
        # the layer behind the cut ranks: what it would attend to
        return tuple(
            CutPoint(layer, max(1, int(count * r_s)), source=layer)
            for layer, r_s in zip(layers, r, strict=True)
        )

    def score(self, tokens: VisualTokens) -> Tensor:
        A = tokens.need("text_attention")[:, :, -1]  # (B, H, R, N) -> (B, H, N), last row
        return A.mean(dim=1)


def geometric_shares(layers: tuple[int, ...], depth: int, mean: float | None) -> tuple[float, ...]:
    """Shares r, r^2, ... with this ``mean`` over all layers, the first of which read all; None: r = 0.5."""
    if mean is None:
        return tuple(0.5**stage for stage in range(1, len(layers) + 1))
    if mean <= layers[0] / depth:
        raise SpecError(
            f"keep asks for {mean:.3f} of the tokens on average over the layers, but layers "
            f"0..{layers[0] - 1} of {depth} read all of them, which is {layers[0] / depth:.3f} already; cut "
            "earlier, as in layers=(1, 2, 3), or keep more"
        )
    # layers that read all tokens, those that read r of them, r^2, ...
    lengths = [after - before for before, after in pairwise((0, *layers, depth))]
    low, high = 0.0, 1.0
    # bisection: the mean grows with r, and a float has no digits for more halvings
    for _ in range(60):
        r = (low + high) / 2
        if sum(length * r**stage for stage, length in enumerate(lengths)) / depth < mean:
            low = r
        else:
            high = r
    # the last digits are noise of the sum: a share of 1 that lost them would drop a token
    r = round(r, 12)
    return tuple(r**stage for stage in range(1, len(layers) + 1))
