# SPDX-License-Identifier: Apache-2.0
"""AdaptInfer: three cuts, each ranked by the text, weighted by how much the text attends to itself there.

Zhang et al., "AdaptInfer: Adaptive Token Pruning for Vision-Language Model Inference with Dynamical Text
Guidance", arXiv:2508.06084.

With A the softmaxed attention of layer l, t and u tokens of the text behind the picture and v its tokens,

    w_ht    = sum over u of (A_htu + A_hut) - A_htt,
    score_v = sum over heads h and text t of w_ht * A_htv,

the best b_l tokens leave layer l. Which words count is thus said by the layer itself.

Deviations: each picture and sample by itself, where the official code applies sample 0 to all; padding takes
no part; float32; the lower index wins ties; positions stay, as in the authors' code for Qwen2-VL
(``positions="compact"`` re-counts them, as their LLaVA code does); without text behind the picture the last
token of the prompt ranks. Budgets that were not published are solved for, see ``stage_budgets``.
Provenance: written from a description of paper and research code (commits 9dac67c, 268dc63, 8f5ae0c,
Apache-2.0 by its README); no code copied.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor

from ..checks import check_ids, check_layers, check_number
from ..core.method import CutPoint, Method, Need, Positions, SlotName
from ..core.tokens import VisualTokens
from ..errors import SpecError
from ..registry import register
from .depths import scaled_layers

LAYERS, DEPTH = (1, 10, 20), 32
# depth -> layers, and the tokens that leave them for a mean of ``keep`` of COUNT
PUBLISHED: dict[int, tuple[tuple[int, ...], dict[int, tuple[int, ...]]]] = {
    32: (LAYERS, {128: (290, 72, 18), 64: (133, 27, 3), 48: (80, 24, 2), 32: (40, 12, 0)}),
    40: ((1, 11, 21), {128: (300, 94, 30), 64: (148, 40, 5)}),
}
COUNT = 576


@register("adaptinfer")
@dataclass(frozen=True)
class AdaptInfer(Method):
    """The text that a layer attends to most ranks the tokens that leave it, at three layers.

    ``keep`` is the authors' mean: a layer counts the tokens that leave it.

    Args:
        layers: whose attention ranks, and behind which tokens leave; None: (1, 10, 20) of 32, as deep in
            other models.
        budgets: what leaves each of them: tokens as whole numbers, or shares of what entered it; in place of
            ``keep``.
        mix: 1 weighs the text tokens, 0 all alike, between them both in part.
        skip: ids of tokens of the text that do not rank, such as those of stop words (RefAM).
    """

    layers: tuple[int, ...] | None = None
    budgets: tuple[float, ...] | None = None
    mix: float = 1.0
    skip: tuple[int, ...] = ()

    slot: ClassVar[SlotName] = "inside_lm"
    landing: ClassVar[tuple[str, int] | None] = ("layers", 0)
    query_aware: ClassVar[bool] = True
    nested: ClassVar[bool] = False  # later stages rank with layers that saw other tokens
    positions: ClassVar[Positions] = "original"
    needs: ClassVar[tuple[Need, ...]] = (
        Need("text_attention", text="question"),
        Need("text_to_text", text="question"),
    )
    paper: ClassVar[str] = "arXiv:2508.06084"
    licence: ClassVar[str] = "Apache-2.0"

    def __post_init__(self) -> None:
        layers, budgets = self.layers, self.budgets
        if layers is not None:
            check_layers("layers", layers, first=0)
        if budgets is not None:
            if any(b < 0 or (type(b) is float and not 0 < b <= 1) for b in budgets):
                raise SpecError(f"budgets={budgets}; expected numbers of tokens, or shares in (0, 1]")
            stages = len(LAYERS) if layers is None else len(layers)
            if len(budgets) != stages:
                raise SpecError(f"budgets={budgets} for {stages} layers; expected one budget per layer")
        check_number("mix", self.mix, 0, 1)
        check_ids("skip", self.skip)
        object.__setattr__(self, "skips", self.skip)

    def cuts(self, depth: int, budget: Any, count: int) -> tuple[CutPoint, ...]:
        if (budget is None) == (self.budgets is None):
            raise SpecError(
                f"adaptinfer got the budget {budget} and budgets={self.budgets}; give one of them, such as "
                "adaptinfer@64 or adaptinfer(budgets=(133, 27, 3))"
            )
        published, table = PUBLISHED.get(depth, (None, {}))
        layers = self.layers or published or scaled_layers(LAYERS, DEPTH, depth)
        # tokens leave behind the layer that ranks, so the cut is at the input of the next one
        if layers[-1] + 1 >= depth:
            raise SpecError(
                f"layers={layers}, behind which tokens leave, but the language model has layers "
                f"0..{depth - 1}; choose layers below {depth - 1}"
            )
        wanted: tuple[float, ...]
        if self.budgets is not None:
            wanted = self.budgets
        elif budget.count(count) == count:  # all tokens stay: the dense model
            return tuple(CutPoint(layer + 1, count, source=layer) for layer in layers)
        elif layers == published and count == COUNT and budget.count(count) in table:
            wanted = table[budget.count(count)]
        else:
            wanted = stage_budgets(budget.count(count), layers, depth, count)
        points, left = [], count
        for layer, b in zip(layers, wanted, strict=True):
            # a number of tokens is capped, since each cut must remove one; a share of what is left is not
            left = min(b, left - 1) if isinstance(b, int) else max(1, min(int(round(b * left, 6)), left))
            left = max(left, 0)
            points.append(CutPoint(layer + 1, left, source=layer))
        return tuple(points)

    def score(self, tokens: VisualTokens) -> Tensor:
        w = text_weights(tokens.need("text_to_text"), tokens.query_mask, self.mix)  # (B, H, R)
        # (B, H, R, 1) times (B, H, R, N)
        return (w[..., None] * tokens.need("text_attention").float()).sum(dim=(1, 2))


def text_weights(attention: Tensor, real: Tensor | None = None, mix: float = 1.0) -> Tensor:
    """(B, H, R) attention that every text token gives to and gets from the text, of attention (B, H, R, R);
    0 for those that are not ``real`` (B, R).
    """
    A = attention.float()
    count = A.new_full((A.shape[0], 1, 1), A.shape[-1])
    if real is not None:
        both = real[:, None, :, None] & real[:, None, None]  # (B, 1, R, R)
        A = A.masked_fill(~both, 0.0)
        count = real.sum(dim=1)[:, None, None]
    # what a token gives itself stands in both sums
    w = A.sum(dim=2) + A.sum(dim=3) - A.diagonal(dim1=2, dim2=3)
    # mix = 0 gives every word the mean weight of all
    w = mix * w + (1 - mix) * w.sum(dim=2, keepdim=True) / count
    return w if real is None else w.masked_fill(~real[:, None], 0.0)


def counted_mean(layers: tuple[int, ...], budgets: tuple[int, ...], depth: int, count: int) -> float:
    """Mean over the layers of the tokens that leave each: the average that the authors give."""
    # a layer counts what leaves it, so b_l holds for l and all layers up to the next cut
    spans = [after - before for before, after in pairwise((0, *layers, depth))]
    return sum(span * left for span, left in zip(spans, (count, *budgets), strict=True)) / depth


def stage_budgets(keep: int, layers: tuple[int, ...], depth: int, count: int) -> tuple[int, ...]:
    """The most tokens that may leave the layers for a counted mean of at most ``keep``.

    Behind each layer a quarter of those before goes on, a fifth where keep is below 100; more only where all
    but one token leave the first layer and the mean is still not met.
    """

    def mean(first: int, ratio: float) -> float:
        return counted_mean(layers, falling(first, ratio, len(layers)), depth, count)

    ratio, most, wanted = 0.25 if keep >= 100 else 0.2, count - 1, float(keep)
    if mean(most, ratio) < keep:
        # the first layer keeps the most it may, so only a slower fall can meet the mean
        ratio = (bisect_right(range(1001), wanted, key=lambda share: mean(most, share / 1000)) - 1) / 1000
        return falling(most, ratio, len(layers))
    # the mean grows with the first budget: bisection finds the last one that fits
    first = bisect_right(range(count), wanted, key=lambda b: mean(b, ratio)) - 1
    if first < 0:
        raise SpecError(
            f"keep asks adaptinfer for {keep} of {count} tokens on average, but the layers before "
            f"{layers[0]} of {depth} read all of them, which is {count * layers[0] / depth:g} already; rank "
            "earlier, or keep more"
        )
    return falling(first, ratio, len(layers))


def falling(first: int, ratio: float, stages: int) -> tuple[int, ...]:
    """Budgets of which each is a share of the one before, rounded down."""
    budgets = [first]
    for _ in range(stages - 1):
        budgets.append(int(ratio * budgets[-1]))
    return tuple(budgets)
