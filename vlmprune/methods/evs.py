# SPDX-License-Identifier: Apache-2.0
"""EVS, efficient video sampling: drop the tokens that are as they were one frame before.

With x_t,i the token at place i of frame t, as the language model would read it:

    d_t,i = 1 - cos(x_t,i, x_t-1,i)          d = 255 in the first frame
    kept  = the K tokens of the clip with the highest d

The first frame stays whole, as what the others differ from, so that no budget may be below one frame. A frame
is compared with the one before it, not with the last one that was kept: a slow drift is never picked up.

Deviations: cosines in float32; the lower index wins ties; K is the budget, and the first frame a part of it.
``variant="official"`` counts as the authors do, max(n, int(T n (1 - q))) in double precision for T frames of
n tokens, and takes cosines in the dtype of the model. The paper measures pixels against a quantile; this is
the rule that its authors ship.
Provenance: arXiv:2510.14624; written from a description of vLLM, SGLang and transformers 5.24
(nemotron_h_omni, Apache-2.0), which keep the same tokens; no code copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check_number, one_of
from ..core.method import Method, Positions, What
from ..core.select import top_k
from ..core.tokens import VisualTokens
from ..errors import SpecError
from ..registry import register
from .clips import clip_features, counts_by_itself, frames_of, neighbour_cosine

_ANCHOR = 255.0  # above any difference, which is 2 at most, and finite


def official_keep(tokens_per_frame: int, frames: int, q: float) -> int:
    """Tokens that the authors keep of a clip at the pruning rate q."""
    # in this order: 1 - 0.9 is 0.0999..., and 1000 tokens give 99
    return max(tokens_per_frame, int(tokens_per_frame * frames * (1 - q)))


@register("evs")
@dataclass(frozen=True)
class EVS(Method):
    """Ranks the tokens of a clip by how much they differ from the same place one frame before.

    Args:
        variant: "exact" keeps the budget, "official" takes none and counts as the authors do.
        q: share of the tokens that the official count drops; not read by "exact".
    """

    variant: str = "exact"
    q: float = 0.75

    needs: ClassVar[tuple[What, ...]] = ("features",)
    positions: ClassVar[Positions] = "original"
    clips: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2510.14624"
    licence: ClassVar[str] = "Apache-2.0"

    def __post_init__(self) -> None:
        one_of("variant", self.variant, ("exact", "official"))
        check_number("q", self.q, 0, 1)
        if self.q == 1:
            raise SpecError("q=1 drops everything; expected a share to drop from 0 to below 1")
        if self.variant == "official":
            counts_by_itself(self)

    def score(self, tokens: VisualTokens) -> Tensor:
        x = clip_features(self, tokens)  # (B, T, n, D)
        if self.variant == "official":
            # in the dtype of the model, where ``neighbour_cosine`` has float32
            cosine = torch.nn.functional.cosine_similarity(x[:, 1:], x[:, :-1], dim=-1)
        else:
            cosine = neighbour_cosine(x)
        # nothing comes before the first frame: d = 255 keeps it whole
        anchor = cosine.new_full((x.shape[0], 1, x.shape[2]), _ANCHOR)
        return torch.cat([anchor, 1 - cosine], dim=1).flatten(1).float()

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        frames, n = frames_of(self, tokens)
        if k < n:
            raise SpecError(
                f"keep: {k} tokens of {frames} frames are too few for {self.name}, which keeps the first of "
                f"them whole; keep at least {n}"
            )
        return top_k(self.score(tokens), k)

    def own(self, tokens: VisualTokens) -> Tensor:
        frames, n = frames_of(self, tokens)
        kept = top_k(self.score(tokens), official_keep(n, frames, self.q))
        return torch.zeros(tokens.batch, tokens.count, dtype=torch.bool, device=kept.device).scatter(
            1, kept, True
        )
