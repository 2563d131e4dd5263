# SPDX-License-Identifier: Apache-2.0
"""HoliTom's part inside the language model: keep what the last token attends to, fold in what leaves.

At the input h of decoder layer k, with a the attention of the last prompt token one layer before:

    kept    = the visual tokens with the highest a
    h_j     = mean of h_j and of all tokens that leave and are most like h_j (cosine)     for every kept j

Deviations: the authors halve h_j for every token that joins it, one by one, so that the last of m has weight
1/2 and h_j itself 2^-m (``combine="sequential"``); a mean is what one would expect. Float32.
Provenance: arXiv:2505.21334; written from a description of the official code (commit e9b2972, Apache-2.0);
no code copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...checks import check_int, one_of
from ...core.budget import Budget
from ...core.merged import Merged, joins_of, numbers
from ...core.method import CutPoint, Method, Positions, SlotName, What
from ...core.select import rest_of, rows_at, top_k
from ...core.tokens import VisualTokens
from ...errors import SpecError
from ...registry import register
from ..clustering import cluster_sums

PUBLISHED = 18 / 28  # the layer of the authors, as a share of the depth
_AT_ONCE = 512  # bounds the cosines held at a time


def most_alike(kept: Tensor, gone: Tensor) -> Tensor:
    """(M,) which of the rows kept (k, D) each of gone (M, D) is most like."""
    unit = normalize(kept, dim=-1, eps=1e-8)
    parts = [(normalize(some, dim=-1, eps=1e-8) @ unit.T).argmax(dim=1) for some in gone.split(_AT_ONCE)]
    return torch.cat(parts)


def from_the_last(joins: Tensor) -> Tensor:
    """(M,) how many later tokens join the same row, where each joins one (M,)."""
    # tokens in groups by the row that they join, in order within a group
    order = joins.sort(stable=True).indices
    # where the own group ends, less the place in it
    later = torch.bincount(joins).cumsum(0)[joins[order]] - 1 - torch.arange(len(joins), device=joins.device)
    return torch.empty_like(later).scatter(0, order, later)


def folded(kept: Tensor, gone: Tensor, joins: Tensor, combine: str) -> Tensor:
    """(k, D) float32 rows kept (k, D) with those of gone (M, D) folded in, as each joins one (M,)."""
    kept, gone = kept.float(), gone.float()
    if combine == "mean":
        sums, members = cluster_sums(gone, joins, len(kept))
        return (kept + sums) / (members + 1)
    # halved when it joins, and by every later one: the last has 1/2
    weight = 0.5 ** (from_the_last(joins) + 1)
    sums, members = cluster_sums(gone * weight[:, None], joins, len(kept))
    return kept * 0.5**members + sums


@register("holitom_inner")
@dataclass(frozen=True)
class HoliTomInner(Method):
    """Keeps the tokens that the last prompt token attends to, and averages the others into those like them.

    Args:
        layer: the first layer that reads the shorter sequence; None: 18 of 28, or as deep in others.
        combine: "mean", or "sequential" as published.
    """

    layer: int | None = None
    combine: str = "mean"

    slot: ClassVar[SlotName] = "inside_lm"
    landing: ClassVar[tuple[str, int] | None] = ("layer", 1)
    query_aware: ClassVar[bool] = True
    nested: ClassVar[bool] = False
    positions: ClassVar[Positions] = "original"
    needs: ClassVar[tuple[What, ...]] = ("text_attention", "features")
    paper: ClassVar[str] = "arXiv:2505.21334"
    licence: ClassVar[str] = "Apache-2.0"

    def __post_init__(self) -> None:
        if self.layer is not None:
            check_int("layer", self.layer, least=1)
        one_of("combine", self.combine, ("mean", "sequential"))

    def cuts(self, depth: int, budget: Budget | None, count: int) -> tuple[CutPoint, ...]:
        if budget is None:
            raise SpecError("holitom_inner needs a budget; holitom_inner@0.5 is published")
        layer = max(round(PUBLISHED * depth), 1) if self.layer is None else self.layer
        if layer >= depth:
            raise SpecError(
                f"layer={layer} but the language model has layers 0..{depth - 1}; choose a smaller one"
            )
        return (CutPoint(layer, budget.count(count), source=layer - 1),)

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.need("text_attention")[:, :, -1].float().mean(dim=1)  # (B, H, R, N) -> (B, N)

    def merge(self, tokens: VisualTokens, k: int) -> Merged:
        features = tokens.need("features")
        keep = top_k(self.score(tokens), k)
        rest = rest_of(keep, tokens.count)
        own, gone = rows_at(features, keep), rows_at(features, rest)
        joins = [most_alike(*pair) for pair in zip(own.float(), gone.float(), strict=True)]
        units = zip(own, gone, joins, strict=True)
        rows = torch.stack([folded(*unit, self.combine) for unit in units])
        n = tokens.count
        return Merged(
            rows.to(features.dtype),
            keep,
            joins=lambda: joins_of([(keep, numbers(keep)), (rest, torch.stack(joins))], n),
        )
