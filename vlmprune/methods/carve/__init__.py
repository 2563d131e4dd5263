# SPDX-License-Identifier: Apache-2.0
"""CARVE: ask, find the region that the question is about, and ask again with that region beside the picture.

Attention to patches is what the picture attracts by itself, times what the question asks. The same picture is
read under a general instruction, and the two are divided, step by step of both answers:

    c = A_Q / (A_G + lam),   S = sum over steps t of (t + 1) times the sum of c over layers

S is enlarged to the picture; of the regions in its highest fifth the best stay, all else becomes black, the
bounding box is cropped and enlarged, and the model answers again with both pictures.

Deviations: patches form the grid that the model gives them (the official code reads some counts as squares);
a crop is not enlarged beyond the area of the picture (``official_size=True`` does); a KV cache is used.
Provenance: "CARVE", arXiv:2509.06461; written from a description of paper and official code (commit a1f0442,
no licence file); no code copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ...checks import check_int, check_number, check_positive, one_of
from ...core.method import Method, SlotName
from ...errors import SpecError
from ...registry import register
from .region import Steps, Strategy, kept_mask

GENERAL = "Write a general description of the image."


@register("carve")
@dataclass(frozen=True)
class CARVE(Method):
    """Asks, finds the region that the question is about, and asks again with that region beside the picture.

    Args:
        instruction: what the picture is read under for comparison.
        layers: decoder layers whose attention is read; none: those from 5/8 to 13/16 of the depth.
        steps: of the two answers, all, first or last; first needs no generation for the maps.
        lam: added to the attention under the instruction.
        top_share: share of the pixels that form regions, and of the regions that stay.
        min_regions: regions that stay at least.
        strategy: regions are ranked by attention_sum or size, or those below 0.1 % of the area go
            (drop_small).
        official_size: enlarge the crop until it covers the picture on both sides, whatever its area.
    """

    instruction: str = GENERAL
    layers: tuple[int, ...] | None = None
    steps: Literal["all", "first", "last"] = "all"
    lam: float = 1e-8
    top_share: float = 0.2
    min_regions: int = 3
    strategy: Literal["attention_sum", "size", "drop_small"] = "attention_sum"
    official_size: bool = False

    slot: ClassVar[SlotName] = "answer"
    budgeted: ClassVar[bool] = False
    query_aware: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2509.06461"
    licence: ClassVar[str] = "none stated"

    def __post_init__(self) -> None:
        one_of("steps", self.steps, get_args(Steps))
        one_of("strategy", self.strategy, get_args(Strategy))
        check_positive("lam", self.lam)
        check_number("top_share", self.top_share, least=0.0, most=1.0)
        check_int("min_regions", self.min_regions, least=1)
        one_of("official_size", self.official_size, (True, False))

    def looks_at(self, depth: int) -> list[int]:
        """The decoder layers of ``depth`` whose attention is read, in order."""
        chosen = middle_layers(depth) if self.layers is None else sorted(self.layers)
        if not chosen or not all(type(layer) is int and 0 <= layer < depth for layer in chosen):
            raise SpecError(f"layers={self.layers}; expected one or more decoder layers of 0..{depth - 1}")
        return chosen

    def region(self, values: Tensor) -> Tensor:
        return torch.from_numpy(kept_mask(values, self.top_share, self.min_regions, self.strategy))


def middle_layers(depth: int) -> list[int]:
    """Layers 20 to 25 of 32, and the same share of other depths."""
    first = min(depth * 5 // 8, depth - 1)
    return list(range(first, max(first + 1, depth * 13 // 16)))
