# SPDX-License-Identifier: Apache-2.0
"""VidCom2: more budget for unusual frames, then the most unusual tokens of each frame.

With z_t,i the half of the channels that vary least over the clip, of token i of T x n, made a unit row, c the
mean of all z, c_t that of frame t, b the share that is kept, and a = 1/8, 1/4, 1/2, 1, 2:

    v_t,i = sum over a of exp(-|z - c|^2 / 2a),      f_t,i the same with c_t
    p     = softmax over frames of u_t / 0.01,       u_t = -mean over i of v_t,i
    s_t   = min(1, b (1 + p_t - 1 / T)),             k_t = max(1, round(n s_t))
    kept  = in every frame the k_t tokens with the lowest v + f

The shares add up to b T: one frame's worth of budget goes by p, and no frame gets more than twice its share.

Deviations: float32, where the authors' half precision gives other budgets in most frames; the lower index
wins ties, of channels too; exactly k tokens: of what the rule kept the highest v + f of the whole clip are
dropped, or the lowest added, as vLLM does. With fewer tokens than frames the best of each frame compete.
``variant="official"`` takes no budget and keeps what rounding gives.
Provenance: arXiv:2505.14454; written from a description of the official code (commit 944a17d, Apache-2.0)
and of vLLM's port; no code copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..checks import check_number, one_of
from ..core.method import Method, Positions, What
from ..core.select import highest, ranked
from ..core.tokens import VisualTokens
from ..errors import SpecError
from ..registry import register
from .clips import clip_features, counts_by_itself

BANDWIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)  # the a of v and f
TEMPERATURE = 0.01  # of the softmax over frames


def calm_channels(x: Tensor) -> Tensor:
    """(B, max(D // 2, 1)) ascending channels of x (B, T, n, D) that vary least over the clip."""
    spread = x.float().flatten(1, 2).var(dim=1, correction=0)  # (B, D)
    return ranked(-spread)[:, : max(x.shape[-1] // 2, 1)].sort(dim=1).values


def kernel(z: Tensor, centre: Tensor) -> Tensor:
    """(B, T, n) how near z (B, T, n, C) is to a centre (B, T or 1, 1, C), 5 at most."""
    far = (z - centre).square().sum(dim=-1)
    return torch.stack([(-far / (2 * a)).exp() for a in BANDWIDTHS]).sum(dim=0)


def likeness(x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, n) each: v and f of the tokens x (B, T, n, D)."""
    # (B, T, n, C): every token has the same half of the channels
    channels = calm_channels(x)[:, None, None].expand(-1, *x.shape[1:3], -1)
    z = normalize(x.gather(3, channels).float(), dim=-1, eps=1e-12)
    # v by the mean of the clip, f by that of the frame
    return kernel(z, z.mean(dim=(1, 2), keepdim=True)), kernel(z, z.mean(dim=2, keepdim=True))


def frame_shares(v: Tensor, b: float) -> Tensor:
    """(B, T) share of its tokens that each frame keeps, from v (B, T, n) and the share b of the clip."""
    unusual = -v.mean(dim=2)
    p = (unusual / TEMPERATURE).softmax(dim=1)
    # s_t; before the limit the shares add up to b T
    return (b * (1 + p - 1 / v.shape[1])).clamp_max(1.0)


def frame_counts(v: Tensor, b: float) -> Tensor:
    """(B, T) int64 tokens that each frame keeps."""
    return (frame_shares(v, b) * v.shape[2]).round().clamp_min(1).long()  # halves go to the even number


def lowest_in_frames(likeness: Tensor, counts: Tensor) -> Tensor:
    """(B, T * n) bool: in every frame of likeness (B, T, n) its ``counts`` (B, T) lowest."""
    scores = -likeness.flatten(0, 1)
    kept = highest(scores, counts.flatten(), torch.ones_like(scores, dtype=torch.bool))
    return kept.view(likeness.shape[0], -1)


def exactly(kept: Tensor, likeness: Tensor, k: int) -> Tensor:
    """(B, k) the lowest likeness (B, N) among the ``kept`` (B, N), and then among the others."""
    order = ranked(-likeness)
    # kept tokens first, then the others; a stable sort leaves either in the order of likeness
    first = kept.gather(1, order).to(torch.int8).sort(dim=1, descending=True, stable=True).indices
    return order.gather(1, first[:, :k])


@register("vidcom2")
@dataclass(frozen=True)
class VidCom2(Method):
    """Keeps the tokens least like the mean of the clip and of their frame, more of unusual frames.

    Args:
        variant: "exact" keeps the budget, "official" takes none and keeps what rounding gives.
        b: share that the official count starts from; not read by "exact".
    """

    variant: str = "exact"
    b: float = 0.25

    needs: ClassVar[tuple[What, ...]] = ("features",)
    nested: ClassVar[bool] = False
    positions: ClassVar[Positions] = "original"
    clips: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2505.14454"
    licence: ClassVar[str] = "Apache-2.0"

    def __post_init__(self) -> None:
        one_of("variant", self.variant, ("exact", "official"))
        check_number("b", self.b, 0, 1)
        if not self.b:
            raise SpecError("b=0 keeps nothing; expected a share above 0, at most 1")
        if self.variant == "official":
            counts_by_itself(self)

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        return self.select_from(tokens, k, k / tokens.count)

    def select_from(self, tokens: VisualTokens, k: int, b: float) -> Tensor:
        """(B, k) tokens where the frames share out b of the clip."""
        v, f = likeness(clip_features(self, tokens))
        # fewer tokens than frames: one of each is offered, and the best k of these stay
        counts = torch.ones_like(v[..., 0]).long() if k < v.shape[1] else frame_counts(v, b)
        return exactly(lowest_in_frames(v + f, counts), (v + f).flatten(1), k)

    def own(self, tokens: VisualTokens) -> Tensor:
        v, f = likeness(clip_features(self, tokens))
        return lowest_in_frames(v + f, frame_counts(v, self.b))
