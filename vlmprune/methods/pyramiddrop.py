# SPDX-License-Identifier: Apache-2.0
"""PyramidDrop: staged cuts, each ranked by what the next layer's own projections would attend to.

Xing et al., "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy
Reduction", arXiv:2410.17247.

Deviations: grouped-query models repeat their keys (the official code fails there); several images, padding
and batches are ranked per image; sequences are not truncated. ``keep`` is the mean over all layers of the
tokens that are read; without it the paper's shares are used.
Provenance: written from a description of paper and official code (commit 6444f30, MIT); no code copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor

from ..core.method import CutPoint, Method, What
from ..core.tokens import VisualTokens
from ..errors import SpecError
from ..registry import register


@register("pyramiddrop")
@dataclass(frozen=True)
class PyramidDrop(Method):
    """Keeps ``shares[i]`` of the original tokens from layer ``layers[i]`` on.

    Args:
        layers: where cuts are made; None: a quarter, a half and three quarters of the depth (8, 16, 24 of
            32).
        shares: of the original count, decreasing; None: 0.5, 0.25, 0.125, or what meets ``keep`` with a
            constant ratio.
    """

    layers: tuple[int, ...] | None = None
    shares: tuple[float, ...] | None = None

    slot: ClassVar[str] = "inside_lm"
    query_aware: ClassVar[bool] = True
    nested: ClassVar[bool] = False  # later stages rank with layers that saw other tokens
    positions: ClassVar[str] = "compact"
    needs: ClassVar[tuple[What, ...]] = ("text_attention",)
    paper: ClassVar[str] = "arXiv:2410.17247"
    licence: ClassVar[str] = "MIT"

    def __post_init__(self) -> None:
        if self.layers is not None and (
            not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 1
        ):
            raise SpecError(
                f"layers={self.layers}; expected ascending decoder layers from 1 on, such as (8, 16, 24)"
            )
        if self.shares is not None:
            if any(not 0 < share <= 1 for share in self.shares) or any(
                a <= b for a, b in pairwise(self.shares)
            ):
                raise SpecError(
                    f"shares={self.shares}; expected decreasing shares of the original tokens, in (0, 1]"
                )
            cuts = 3 if self.layers is None else len(self.layers)
            if len(self.shares) != cuts:
                raise SpecError(f"shares={self.shares} for {cuts} layers; expected one share per layer")

    def cuts(self, depth: int, budget: Any, count: int) -> tuple[CutPoint, ...]:
        if self.layers is None and depth < 4:
            raise SpecError(
                f"a language model of {depth} layers has no quarters to cut at; choose layers, such as "
                "layers=(1,)"
            )
        layers = self.layers or tuple(depth * quarter // 4 for quarter in (1, 2, 3))
        if layers[-1] >= depth:
            raise SpecError(
                f"layers={layers} but the language model has layers 0..{depth - 1}; choose smaller ones"
            )
        if self.shares is not None and budget is not None:
            raise SpecError(f"shares={self.shares} set the budget already; drop '@{budget}' or the shares")
        shares = self.shares or geometric_shares(
            layers, depth, None if budget is None else budget.count(count) / count
        )
        return tuple(
            CutPoint(layer, max(1, int(count * share)), source=layer)
            for layer, share in zip(layers, shares, strict=True)
        )

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.need("text_attention")[:, :, -1].mean(dim=1)  # (B, H, R, N) -> (B, N)


def geometric_shares(layers: tuple[int, ...], depth: int, mean: float | None) -> tuple[float, ...]:
    """Shares r, r^2, ... whose mean over all layers (the first ones read everything) is ``mean``; r = 0.5 for
    None.
    """

    def mean_share(ratio: float) -> float:
        lengths = [after - before for before, after in pairwise((0, *layers, depth))]
        return sum(length * ratio**stage for stage, length in enumerate(lengths)) / depth

    if mean is None:
        ratio = 0.5
    elif mean <= layers[0] / depth:
        raise SpecError(
            f"keep asks for {mean:.3f} of the tokens on average over the layers, but layers "
            f"0..{layers[0] - 1} of {depth} read all of them, which is {layers[0] / depth:.3f} already; cut "
            "earlier, as in layers=(1, 2, 3), or keep more"
        )
    else:
        low, high = 0.0, 1.0
        for _ in range(60):
            ratio = (low + high) / 2
            low, high = (ratio, high) if mean_share(ratio) < mean else (low, ratio)
    return tuple(ratio ** (stage + 1) for stage in range(len(layers)))
