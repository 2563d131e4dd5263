# SPDX-License-Identifier: Apache-2.0
"""PruMerge: patches that stick out of the attention of [CLS] are centres, and what is like them is merged in.

The attention of [CLS] is sparse, so its outliers are enough and their number follows the picture. With q and
k the query of [CLS] and the keys of the last block, all heads side by side (width C), x the patches as the
projector takes them, and Q1, Q3 the quartiles of a:

    a_j = softmax over [CLS] and the patches of q . k_j / sqrt(C)
    centres = the patches with a_j > Q3 + 1.5 (Q3 - Q1)
    y_i = x_i + sum of a_j x_j over the 32 patches whose keys are most like k_i      for every centre i
    one more row: sum of a_j x_j over all patches that are no centres

PruMerge+ adds evenly spaced patches to the centres, about three for every outlier. With a budget of T tokens
there are T - 1 centres: the highest a, or with ``plus`` a quarter of them by a and the rest evenly spaced.

Deviations: outliers are counted in every picture alone, and there is at least one centre; the official code
pools them over the batch, leaves out the last patch of the even grid and has no grid at all from N / 3
outliers on (``variant="official"``, where that is an error). Rows are in reading order; ``order="official"``
has the centres by attention. Float32. For towers without [CLS] ``cls="mean"`` takes the attention that a
patch receives, which is not in the paper.
Provenance: Shang et al., arXiv:2403.15388; written from a description of paper and official code (commit
097c041, Apache-2.0); no code copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..checks import check_int, check_number, one_of
from ..core.merged import Merged
from ..core.method import Counts, Method, Need
from ..core.select import ranked, rest_of, rows_at, top_k
from ..core.tokens import VisualTokens
from ..errors import UnsupportedError
from ..registry import register
from .tower import check_tower_options

_LAST = -1  # the block whose queries and keys are read, as an index into the hidden states
_CENTRES_AT_ONCE = 512  # bounds the cosines held at a time


def outliers(a: Tensor, iqr: float) -> Tensor:
    """(B,) how many of the attentions (B, n) lie more than ``iqr`` quartile ranges above the third one."""
    low, high = torch.quantile(a, torch.tensor([0.25, 0.75], device=a.device), dim=1, keepdim=True)
    return (a > high + iqr * (high - low)).sum(dim=1)


def joined(best: Tensor, places: range) -> Tensor:
    """(k + m,) the best patches (k,) and behind them those of an even grid that are not among them."""
    grid = torch.tensor(places, device=best.device)
    return torch.cat([best, grid[~torch.isin(grid, best)]])


def nearest(keys: Tensor, centres: Tensor, count: int) -> Tensor:
    """(B, k, count) ascending: the patches whose keys (B, n, C) are most like that of each centre (B, k)."""
    unit = normalize(keys.float(), dim=-1)
    count, found = min(count, keys.shape[1] - 1), []
    if not count or not centres.shape[1]:
        return centres.new_empty(*centres.shape, count)
    for some in centres.split(_CENTRES_AT_ONCE, dim=1):
        cosine = rows_at(unit, some) @ unit.transpose(1, 2)  # (B, some, n)
        # a centre is no neighbour of its own, which is also why there are at most n - 1
        cosine = cosine.scatter(2, some[..., None], -torch.inf)
        found.append(top_k(cosine.flatten(0, 1), count).unflatten(0, some.shape))
    return torch.cat(found, dim=1)


def folded(x: Tensor, a: Tensor, centres: Tensor, near: Tensor) -> Tensor:
    """(B, k, C) float32 rows of centres (B, k) that took in their neighbours (B, k, c), from patches
    (B, n, C) with attention (B, n).
    """
    x, rows = x.float(), []
    for centre, some in zip(
        centres.split(_CENTRES_AT_ONCE, dim=1), near.split(_CENTRES_AT_ONCE, dim=1), strict=True
    ):
        # a product with a matrix of few entries: adding up by index is not deterministic on CUDA
        weights = a.new_zeros(*centre.shape, x.shape[1])  # (B, some, n)
        weights.scatter_(2, some, a[:, None].expand_as(weights).gather(2, some))
        rows.append(rows_at(x, centre) + weights @ x)
    return torch.cat(rows, dim=1)


def members_of(centres: Tensor, near: Tensor, left: bool, n: int) -> Tensor:
    """(B, n, J) the rows that each patch is part of: of centres (B, k) with their neighbours (B, k, c), and,
    where there is one, the row of all others.
    """
    batch, k = centres.shape
    within = torch.zeros(batch, k + left, n, dtype=torch.bool, device=centres.device)
    within[:, :k].scatter_(2, torch.cat([centres[..., None], near], dim=2), True)
    if left:
        within[:, k] = torch.ones_like(within[:, k]).scatter(1, centres, False)
    # the rows of a patch first, in their order, and as many columns as the patch in most rows needs
    wide = int(within.sum(dim=1).max())
    order = (~within).to(torch.int8).argsort(dim=1, stable=True)[:, :wide]  # (B, J, n)
    return torch.where(within.gather(1, order), order, -1).transpose(1, 2)


def left_over(x: Tensor, a: Tensor, centres: Tensor, rule: str) -> Tensor:
    """(B, 1, C) float32: the patches that are no centres, summed or averaged by attention."""
    # the attention of all patches but the centres
    weights = a.scatter(1, centres, 0.0)[:, None]  # (B, 1, n)
    summed = weights @ x.float()
    return summed if rule == "sum" else summed / weights.sum(-1, keepdim=True).clamp_min(1e-12)


@register("prumerge")
@dataclass(frozen=True)
class PruMerge(Method):
    """Rows: the centres with their neighbours merged in, and one that sums up all other patches.

    Args:
        plus: PruMerge+, which adds evenly spaced patches to the centres.
        neighbours: patches that are merged into every centre.
        iqr: how many quartile ranges an outlier lies above the third quartile, without a budget.
        extra: the row for all other patches: "sum" as published, which is small, "mean", or "none".
        order: "raster", or "official": centres by attention, evenly spaced ones, then the other row.
        variant: "picture", or "official", where the pictures of a batch share one count.
        cls: "token", or "mean" for towers without [CLS]: the attention that a patch receives.

    Example:
        ``prumerge`` keeps what the picture asks for, ``prumerge(plus=True)@144`` exactly 144 rows.
    """

    plus: bool = False
    neighbours: int = 32
    iqr: float = 1.5
    extra: str = "sum"
    order: str = "raster"
    variant: str = "picture"
    cls: str = "token"

    counts: ClassVar[Counts] = "both"
    nested: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv:2403.15388"
    licence: ClassVar[str] = "Apache-2.0"

    def __post_init__(self) -> None:
        check_int("neighbours", self.neighbours, 1)
        check_number("iqr", self.iqr, 0, 1e6)
        one_of("extra", self.extra, ("sum", "mean", "none"))
        one_of("order", self.order, ("raster", "official"))
        one_of("variant", self.variant, ("picture", "official"))
        check_tower_options(self.cls, None, "unpad")

    @property
    def ranked_by(self) -> Literal["wide_attention", "received_attention"]:
        """The attention that centres are chosen by."""
        return "wide_attention" if self.cls == "token" else "received_attention"

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        captured = (Need(self.ranked_by, _LAST), Need("wide_keys", _LAST), Need("encoder_features"))
        return (*captured, Need("features"), Need("projector"))

    def least(self, count: int) -> int:
        return 1 if self.extra == "none" else min(2, count)

    def attention(self, tokens: VisualTokens) -> Tensor:
        """(B, N) attention that centres are chosen by."""
        return tokens.need(self.ranked_by).float()

    def centres(self, a: Tensor, k: int) -> Tensor:
        """(B, k) centres at a fixed number: by attention (B, N) and, with ``plus``, evenly spaced ones."""
        if not self.plus:
            return ranked(a)[:, :k]
        # a quarter by attention, the rest evenly spaced over what they leave in reading order
        best = ranked(a)[:, : round(k / 4)]
        rest, m = rest_of(best, a.shape[1]), k - best.shape[1]
        even = torch.arange(m, device=a.device) * rest.shape[1] // max(m, 1)
        return torch.cat([best, rest[:, even]], dim=1)

    def own_centres(self, a: Tensor) -> list[Tensor]:
        """B tensors (k,): the centres that each picture asks for by its attention (B, N)."""
        batch, n = a.shape
        if self.variant == "picture":
            # a flat map has no outlier
            counts = outliers(a, self.iqr).clamp_min(1).tolist()
            # three evenly spaced patches for every outlier
            grids = [range(0, n, max(1, n // count // 3)) for count in counts]
        else:
            ratio = outliers(a.flatten()[None], self.iqr).item() / (batch * n)
            counts = [int(n * ratio)] * batch
            grids = [self._official_grid(n, ratio) if self.plus else range(0)] * batch
        best = [order[:count] for order, count in zip(ranked(a), counts, strict=True)]
        return [joined(*row) for row in zip(best, grids, strict=True)] if self.plus else best

    def _official_grid(self, n: int, ratio: float) -> range:
        """The even grid of the official code that goes with a share of outliers among n patches."""
        step = int(int(1 / ratio) / 3) if ratio else 0
        if not step:
            raise UnsupportedError(
                f"prumerge(plus=True,variant=official) has no even grid for a share of {ratio:.3g} outliers, "
                "as the official code; leave the variant out, or give a budget: 'prumerge(plus=True)@144'"
            )
        return range(0, n - 1, step)  # the last patch is never in it

    def merge(self, tokens: VisualTokens, k: int) -> Merged:
        a = self.attention(tokens)
        # one row of the budget is that of all other patches
        return self._rows(tokens, a, self.centres(a, k - (self.extra != "none")), slice(None))

    def own(self, tokens: VisualTokens) -> list[Merged]:
        a = self.attention(tokens)
        return [
            self._rows(tokens, a, centres[None], slice(row, row + 1))
            for row, centres in enumerate(self.own_centres(a))
        ]

    def _rows(self, tokens: VisualTokens, a: Tensor, centres: Tensor, units: slice) -> Merged:
        """The rows of some units around their centres (B, k)."""
        encoded, keys, a = tokens.need("encoder_features")[units], tokens.need("wide_keys")[units], a[units]
        if encoded.shape[1] != tokens.count:
            raise UnsupportedError(
                f"prumerge merges before the projector, but {encoded.shape[1]} patches become "
                f"{tokens.count} tokens in this one"
            )
        if self.order == "raster":
            centres = centres.sort(dim=1).values
        # y_i: every centre with the patches whose keys are most like its own
        near = nearest(keys, centres, self.neighbours)  # (B, k, c)
        rows = folded(encoded, a, centres, near)
        slots = centres
        if self.extra != "none" and centres.shape[1] < tokens.count:  # else there are no others
            rows = torch.cat([rows, left_over(encoded, a, centres, self.extra)], dim=1)
            # -1: the row of all others has no place of its own
            slots = torch.cat([slots, slots.new_full((slots.shape[0], 1), -1)], dim=1)
        made = tokens.need("projector")(rows.to(encoded.dtype))  # works token by token
        left, n = slots.shape[1] > centres.shape[1], tokens.count
        features = made.to(tokens.need("features").dtype)
        return Merged(features, slots, joins=lambda: members_of(centres, near, left, n))
