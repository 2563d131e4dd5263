# SPDX-License-Identifier: Apache-2.0
"""HoloV: share the budget out over crops of the picture, then keep the best tokens of each crop.

Zou et al., "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context Retention",
arXiv:2510.02912.

Deviations (see the card): the variance cancels out of the crop weights, which come from attention alone; what
proportional shares leave over goes to crops in order of weight; pruned tokens are not fetched again inside
the language model. Provenance: written from a description of paper and official code (commit 1d2e65e,
Apache-2.0); no code copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..checks import one_of
from ..core.grid import Grids, cells
from ..core.method import Method, Need
from ..core.select import top_k_in_groups
from ..core.tokens import VisualTokens
from ..errors import InvariantError, SpecError
from ..registry import register
from .fastervlm import check_tower_options

EPS, ATTENTION_SCALE = 1e-6, 1000.0  # constants of the official code
_TINY = torch.finfo(torch.float32).tiny
_CHUNK = 512  # rows of a similarity matrix held at a time


def windows(grids: Grids, count: int) -> Tensor:
    """(C, M) tokens of about ``count`` near-square windows; a block too small for a window of its size is one
    by itself.
    """
    ids = cells(grids, count)
    block = torch.arange(len(grids)).repeat_interleave(torch.tensor([rows * cols for rows, cols in grids]))
    return _members(torch.where(ids < 0, count + block, ids).unique(return_inverse=True)[1])


def bands(n: int, count: int) -> Tensor:
    """(C, M) tokens of ``count`` runs in raster order, the first of which are one longer where ``count`` does
    not divide n.
    """
    return _members(torch.arange(count).repeat_interleave(n // count + (torch.arange(count) < n % count)))


def _members(crop: Tensor) -> Tensor:
    """(C, M) tokens by crop, -1 behind the last, from the crop (N,) of every token."""
    sizes = torch.bincount(crop)
    real = torch.arange(int(sizes.max())) < sizes[:, None]
    return torch.full(real.shape, -1).masked_scatter(real, crop.argsort(stable=True))


def variance(features: Tensor, members: Tensor) -> Tensor:
    """(B, C, M): how much the cosines of a token with the others of its crop vary; features are (B, N, D)."""
    x = pad(features.float(), (0, 0, 0, 1))[:, members]  # (B, C, M, D); -1 finds a row of zeros
    unit = x / (x.norm(dim=-1, keepdim=True) + EPS)
    real = (members >= 0)[:, None]  # (C, 1, M)
    others = (real.sum(-1, keepdim=True) - 1).clamp_min(1)
    found = []
    for start in range(0, members.shape[1], _CHUNK):
        cosine = unit[:, :, start : start + _CHUNK] @ unit.transpose(2, 3)  # (B, C, chunk, M)
        cosine.diagonal(start, dim1=2, dim2=3).zero_()
        mean = cosine.sum(-1, keepdim=True) / others
        found.append(
            ((cosine - mean).square() * real).sum(-1) / others[..., 0]
        )  # the zero of the diagonal counts
    return torch.cat(found, dim=2) * real[:, 0]


def hand_out(left: Tensor, weight: Tensor, room: Tensor) -> Tensor:
    """(B, C) whole tokens of ``left`` (B,): the heaviest crop gets as many as it has room for, then the
    next."""
    order = torch.sort(-weight, dim=-1, stable=True).indices
    room = room.gather(1, order)
    before = room.cumsum(1) - room
    return torch.zeros_like(room).scatter(1, order, (left[:, None] - before).clamp_min(0).minimum(room))


def paper_quota(weight: Tensor, k: int) -> Tensor:
    """(B, C) shares of k by weight (B, C), rounded down; the heaviest crop gets the rest. May exceed the
    crops.
    """
    share = weight / weight.sum(1, keepdim=True).clamp_min(_TINY) * k
    quota = (share * (1 + 1e-6)).floor().long()  # equal shares must not fall below a whole number by rounding
    return quota + hand_out(k - quota.sum(1), weight, torch.full_like(quota, k))


def official_quota(weight: Tensor, k: int) -> Tensor:
    """(B, C) as ``paper_quota``, but the heaviest crops get one more each. Not capped, they leave the zero
    rows of the code.
    """
    quota = (weight / (weight.sum(1, keepdim=True) + EPS) * k).floor().long()
    return quota + hand_out(k - quota.sum(1), weight, torch.ones_like(quota))


def official_scores(attention: Tensor, sizes: Tensor, alpha: float = 0.09) -> Tensor:
    """(B, C) crop scores of the official code from attention (B, C, M); a crop of one token has its bare
    attention there.
    """
    return attention.sum(-1) / sizes * torch.where(sizes > 1, ATTENTION_SCALE * (1 + alpha), 1.0)


def cap(quota: Tensor, weight: Tensor, sizes: Tensor, k: int) -> Tensor:
    """(B, C) quotas that sum to k: what exceeds a crop goes to those with room, in proportion to weight *
    room.
    """
    over = (quota - sizes).clamp_min(0).sum(1, keepdim=True)
    quota = quota.minimum(sizes)
    pull = weight * (sizes - quota)
    share = (over * (pull / pull.sum(1, keepdim=True).clamp_min(_TINY))).floor().long()
    quota = quota + share.minimum(sizes - quota)
    return quota + hand_out(k - quota.sum(1), weight, sizes - quota)


@register("holov")
@dataclass(frozen=True)
class HoloV(Method):
    """Windows get budget in proportion to mean attention; inside one, attention plus variance of similarity
    decides.

    Args:
        crops: number of windows, at most one per token; None: floor(1024 / k) for 576 tokens, in proportion
            for others.
        alpha: weight of the variance; None: 1 as in the paper, or 0.09 for the official code.
        tau: sharpness; above 1, windows with much attention get more than their share.
        variant: "paper", or "official": horizontal bands, ranked by attention alone.
        cls: "token", or "mean": the attention a patch receives from all patches, for towers without [CLS].
        layer: index into the hidden states of the tower, such as -2; None: the layer the model takes its
            features from.
    """

    crops: int | None = None
    alpha: float | None = None
    tau: float = 1.0
    variant: str = "paper"
    cls: str = "token"
    layer: int | None = None

    nested: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv:2510.02912"
    licence: ClassVar[str] = "Apache-2.0"

    def __post_init__(self) -> None:
        check_tower_options(self.cls, self.layer, "unpad")
        one_of("variant", self.variant, ("paper", "official"))
        if self.crops is not None and (type(self.crops) is not int or self.crops < 1):
            raise SpecError(
                f"crops={self.crops!r} is not a number of crops; expected None or an integer from 1"
            )
        for name, value in (("alpha", 0 if self.alpha is None else self.alpha), ("tau", self.tau)):
            if type(value) not in (int, float) or not 0 <= value < torch.inf:
                raise SpecError(f"{name}={value!r} is not usable; expected a finite number from 0")

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        attention = Need("cls_attention" if self.cls == "token" else "received_attention", self.layer)
        return (attention, Need("features")) if self.variant == "paper" else (attention,)

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        attention = tokens.need(self.needs[0].what).float()
        attention = attention.mean(1) if self.cls == "token" else attention  # (B, H, N) -> (B, N)
        n, paper = tokens.count, self.variant == "paper"
        alpha = self.alpha if self.alpha is not None else 1.0 if paper else 0.09
        count = min(n, self.crops or max(1, 1024 * n // (576 * k)))
        members = (windows(tokens.need("grids"), count) if paper else bands(n, count)).to(
            tokens.device
        )  # (C, M)
        held, sizes = pad(attention, (0, 1))[:, members], (members >= 0).sum(1)  # (B, C, M), (C,)
        if paper:
            scores, varied = held.sum(-1) / sizes, variance(tokens.need("features"), members)
            rank = (
                held + alpha * varied * (scores / (varied.sum(-1) / sizes + EPS))[..., None]
            )  # equal means of both terms
        else:
            scores, rank = official_scores(held, sizes, alpha), held
        top = scores.amax(1, keepdim=True).clamp_min(_TINY)
        weight = (scores / top) ** self.tau * top  # powers of the scores themselves could overflow
        if not bool(torch.isfinite(rank).all() & (attention >= 0).all()):
            raise InvariantError(
                "holov: attention is negative or not finite, or features are not finite. Check for overflow"
            )
        quota = paper_quota(weight, k) if paper else official_quota(weight, k)
        return top_k_in_groups(rank, members, cap(quota, weight, sizes, k), k)
