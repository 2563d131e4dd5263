# SPDX-License-Identifier: Apache-2.0
"""TextMonkey's filter: keep the tokens least like any later one.

Pictures of documents hold many near-copies of blank and repeated tokens. With n_i the token x_i of length
one, as the language model would read it:

    e_i = max over j > i of n_i . n_j,      e = -1 for the last token
    kept = the r tokens with the lowest e

Each token looks at later ones only, so that of a group of copies the last survives, and the last token always
does.

Deviations: the filter alone. In the paper the kept tokens then look once at all tokens through a trained
block, whose last weights start at zero: untrained, it is this filter. Ties keep the lower index.
``compare="all"`` (ours) looks both ways, where two exact copies are both dropped before anything else.
Provenance: Liu et al., arXiv:2403.04473; written from a description of the official code (commit 498e1d9,
MIT); no code copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import one_of
from ..core.method import Method, What
from ..core.tokens import VisualTokens
from ..registry import register

_ROWS_AT_ONCE = 512  # of the cosines: no N x N map is held


def largest_cosine(x: Tensor, compare: str) -> Tensor:
    """(B, N) largest cosine of each token (B, N, D) with a later, or any other one; -1 for none."""
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    column, found = torch.arange(x.shape[1], device=x.device), []
    for rows, own in zip(unit.split(_ROWS_AT_ONCE, dim=1), column.split(_ROWS_AT_ONCE), strict=True):
        other = column > own[:, None] if compare == "later" else column != own[:, None]  # (r, N)
        # no cosine is below -1
        found.append((rows @ unit.transpose(1, 2)).masked_fill(~other, -1.0).amax(dim=2))
    return torch.cat(found, dim=1)


@register("textmonkey")
@dataclass(frozen=True)
class TextMonkey(Method):
    """Ranks tokens by how little they are like any later token.

    Args:
        compare: "later": with later tokens, as published; "all": with all others.
    """

    compare: str = "later"

    needs: ClassVar[tuple[What, ...]] = ("features",)
    paper: ClassVar[str] = "arXiv:2403.04473"
    licence: ClassVar[str] = "MIT"

    def __post_init__(self) -> None:
        one_of("compare", self.compare, ("later", "all"))

    def score(self, tokens: VisualTokens) -> Tensor:
        return -largest_cosine(tokens.need("features"), self.compare)
