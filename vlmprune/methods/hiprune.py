# SPDX-License-Identifier: Apache-2.0
"""HiPrune: anchors of a middle block of the vision encoder with their neighbours, the rest by a deep block.

Middle blocks look at objects, deep blocks spread over the whole picture. With o and a the attention that a
patch receives in a middle and in a deep block, T tokens and share alpha:

    m = round(T alpha / 5)                    anchors: the m patches with the highest o
    P = anchors and their four neighbours     buffers, against noisy maps
    kept = P and the T - |P| patches outside of P with the highest a

Deviations: neighbours stay inside the picture; in the official code the left one of a patch on the left rim
is the end of the row above, and one below the last row is the last patch (``variant="official"``). Where P
exceeds T the weakest anchors are dropped; the official code raises. A budget is that of a picture; the
official one is divided by the size of the batch.
Provenance: arXiv:2508.00553; written from a description of the paper's abstract and the official code (commit
6e83a12, MIT); no code copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check_int, check_number, one_of
from ..core.grid import Grids
from ..core.method import Method, Need
from ..core.select import first_to_fit, ranked, top_k
from ..core.tokens import VisualTokens
from ..errors import SpecError
from ..registry import register
from .tower import check_tower_options


def neighbourhoods(grids: Grids) -> Tensor:
    """(N, 5) every token with those beside, above and below it in its block, -1 beyond the rim."""
    found, start = [], 0
    for rows, cols in grids:
        token = torch.arange(rows * cols).view(rows, cols) + start
        # a frame of -1 stands for what lies outside, so no side needs a case of its own
        framed = torch.nn.functional.pad(token, (1, 1, 1, 1), value=-1)
        # left, right, above, below
        sides = (framed[1:-1, :-2], framed[1:-1, 2:], framed[:-2, 1:-1], framed[2:, 1:-1])
        found.append(torch.stack([token, *sides], dim=-1).view(-1, 5))
        start += rows * cols
    return torch.cat(found)


def wrapped_neighbourhoods(grids: Grids) -> Tensor:
    """(N, 5) the same as the official code has it: plain offsets, which run on into the next row."""
    token, cols = torch.arange(sum(rows * cols for rows, cols in grids)), grids[0][1]
    offsets = torch.tensor([0, -1, 1, -cols, cols])
    return (token[:, None] + offsets).clamp(0, token.shape[0] - 1)


@register("hiprune")
@dataclass(frozen=True)
class HiPrune(Method):
    """Keeps the most attended patches of a middle block with their neighbours, then those of a deep block.

    Args:
        alpha: share of the budget for anchors and their neighbours.
        object_layer: the middle block, as an index into the hidden states of the tower such as 9, or as a
            share of its depth: block 9 of 24, and the second block of Qwen2.5-VL that attends to the whole
            picture.
        min_anchors: fewest anchors; the published rule has none below 26 tokens.
        variant: "grid", or "official", where neighbours run on into the next row.
        layer: the deep block, such as -2; None: the layer the model takes its features from.
        anyres: "unpad", or "spatial", the authors' LLaVA-NeXT layout (budget per raw tile, no newline).

    Example:
        ``vlmprune.select("hiprune", keep=64, grid=(24, 24), received_attention=deep,
        of_layers={Need("received_attention", 0.375): middle})``
    """

    alpha: float = 0.1
    object_layer: int | float = 0.375
    min_anchors: int = 0
    variant: str = "grid"
    layer: int | None = None
    anyres: str = "unpad"

    nested: ClassVar[bool] = False  # there are more anchors in a larger budget
    paper: ClassVar[str] = "arXiv:2508.00553"
    licence: ClassVar[str] = "MIT"

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, 0, 1)
        check_int("min_anchors", self.min_anchors, 0)
        one_of("variant", self.variant, ("grid", "official"))
        check_tower_options("mean", self.layer, self.anyres)
        layer = self.object_layer
        if isinstance(layer, bool) or not (isinstance(layer, int) or 0 < layer <= 1):
            raise SpecError(
                f"object_layer={layer!r}; expected an index into the hidden states such as 9, or a share of "
                "the depth above 0, up to 1.0"
            )
        if self.anyres == "spatial":
            object.__setattr__(self, "layout", "spatial")

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        return tuple(Need("received_attention", layer) for layer in (self.layer, self.object_layer))

    def anchors(self, tokens: VisualTokens, k: int) -> Tensor:
        """(B, m) patches that a budget of k starts from, the most attended one first."""
        o = tokens.need("received_attention", self.object_layer)  # (B, N)
        # m = round(T alpha / 5): each anchor comes with four neighbours
        return ranked(o)[:, : max(self.min_anchors, round(k * self.alpha / 5))]

    def ranking(self, tokens: VisualTokens, k: int) -> Tensor:
        a, grids = tokens.need("received_attention").float(), tokens.need("grids")
        around = neighbourhoods(grids) if self.variant == "grid" else wrapped_neighbourhoods(grids)
        anchors = self.anchors(tokens, k)
        first = first_to_fit(around.to(anchors.device)[anchors], tokens.count, k)  # (B, N)
        # anchors and their neighbours first, all alike, then the best of the others
        return a.masked_fill(first, torch.finfo(a.dtype).max)

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        return top_k(self.ranking(tokens, k), k)
