# SPDX-License-Identifier: Apache-2.0
"""VisionZip: keep the patches [CLS] attends to, merge the rest into a few contextual tokens, keep [CLS]
itself.

Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", arXiv:2412.04467.

Deviations: one budget is split into [CLS], dominant and contextual rows in the published proportion; sums and
cosines in float32; key norms are clamped, where the official code gives NaN for a zero key;
``combine="mean"`` is the averaging that the method is described with, the default "add" is the official code,
which adds the mean of the members to the target.
Provenance: written from a description of paper and official code (commit 3151f6d, Apache-2.0); no code
copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..checks import one_of
from ..core.method import Merged, Method, Need
from ..core.select import rest_of, top_k
from ..core.tokens import VisualTokens
from ..errors import SpecError, UnsupportedError
from ..kernels import unchecked
from ..registry import register
from .fastervlm import check_tower_options


class Groups(NamedTuple):
    """Patch indices, ascending in every row; ``assignment`` numbers the target that each member joins."""

    dominant: Tensor  # (B, d)
    targets: Tensor  # (B, c)
    members: Tensor  # (B, N-d-c)
    assignment: Tensor  # (B, N-d-c)


def group(scores: Tensor, keys: Tensor, dominant: int, contextual: int) -> Groups:
    """Split N patches by scores (B, N) and keys (B, N, d) into dominant patches, evenly spaced targets and
    their members.
    """
    batch, n = scores.shape
    kept = top_k(scores, dominant) if dominant else scores.new_empty(batch, 0, dtype=torch.int64)
    rest = rest_of(kept, n)  # (B, R) raster order
    step = max(1, rest.shape[1] // max(1, contextual))
    target_at = torch.arange(contextual, device=rest.device).expand(batch, contextual) * step
    targets, members = rest.gather(1, target_at), rest.gather(1, rest_of(target_at, rest.shape[1]))
    if not contextual:
        return Groups(kept, targets, members[:, :0], members[:, :0])
    unit = torch.nn.functional.normalize(keys.float(), dim=-1)
    cosine = _rows(unit, members) @ _rows(unit, targets).transpose(1, 2)  # (B, R-c, c)
    return Groups(kept, targets, members, cosine.argmax(-1))


def contextual_rows(features: Tensor, groups: Groups, rule: str) -> Tensor:
    """(B, c, C) float32 contextual rows from encoder features (B, N, C)."""
    target, members = _rows(features, groups.targets).float(), _rows(features, groups.members).float()
    number = torch.arange(target.shape[1], device=target.device)
    joins = (groups.assignment[..., None] == number).float()  # (B, R-c, c); one_hot would wait for the GPU
    total, count = joins.transpose(1, 2) @ members, joins.sum(1)[..., None]
    if rule == "mean":
        return (target + total) / (1 + count)
    return target + total / count.clamp_min(1)


@register("visionzip")
@dataclass(frozen=True)
class VisionZip(Method):
    """Rows: [CLS] of every crop, dominant patches in raster order, contextual tokens. ``keep`` counts all of
    them.

    Args:
        contextual: how many contextual tokens; None: 5/32 of the budget (64 -> 10), at least one once a
            dominant patch has room.
        combine: "add" (official: target + mean of its members) or "mean" (of target and members).
        cls: "token", or "mean" for towers without [CLS]: rank by received attention, no [CLS] row.
        layer: index into the hidden states of the tower, such as -2; None: the layer the model takes its
            features from.
        anyres: "unpad", or "spatial", the authors' LLaVA-NeXT layout (budget per raw tile, no newline).
    """

    contextual: int | None = None
    combine: str = "add"
    cls: str = "token"
    layer: int | None = None
    anyres: str = "unpad"

    nested: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv:2412.04467"
    licence: ClassVar[str] = "Apache-2.0"

    def __post_init__(self) -> None:
        check_tower_options(self.cls, self.layer, self.anyres)
        if self.anyres == "spatial":
            object.__setattr__(self, "layout", "spatial")
        one_of("combine", self.combine, ("add", "mean"))
        if self.contextual is not None and (type(self.contextual) is not int or self.contextual < 0):
            raise SpecError(
                f"contextual={self.contextual!r} is not a number of tokens; expected None or an integer >= 0"
            )

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        if self.cls == "token":
            attention = (Need("cls_attention", self.layer), Need("cls_features"))
        else:
            attention = (Need("received_attention", self.layer),)
        return (
            *attention,
            Need("keys", self.layer),
            Need("encoder_features"),
            Need("features"),
            Need("projector"),
        )

    def split(self, k: int, crops: int = 1) -> tuple[int, int, int]:
        """How many ([CLS], dominant, contextual) rows a budget of k buys a unit of ``crops`` crops."""
        cls_rows = crops if self.cls == "token" else 0
        room = k - cls_rows
        if room < (self.contextual or 0):
            fixed = f"{cls_rows} [CLS] rows and {self.contextual or 0} contextual tokens"
            raise SpecError(
                f"keep={k} is too small for the {fixed} of visionzip; keep at least "
                f"{k - room + (self.contextual or 0)}"
            )
        contextual = self.contextual
        if contextual is None:
            contextual = min(max(1, round(k * 5 / 32)), max(0, room - 1))
        return cls_rows, room - contextual, contextual

    def interleaved(self, k: int, crops: int = 1) -> Tensor:
        """(k,) bool: the rows that take their place in the big image of a spatial layout, that is the
        dominant ones.
        """
        cls_rows, dominant, _ = self.split(k, crops)
        row = torch.arange(k)
        return (row >= cls_rows) & (row < cls_rows + dominant)

    def score(self, tokens: VisualTokens) -> Tensor:
        if self.cls == "mean":
            return tokens.need("received_attention").float()
        return tokens.need("cls_attention").float().sum(1)  # (B, H, N) -> (B, N)

    def merge(self, tokens: VisualTokens, k: int) -> Merged:
        features, encoded, project = (
            tokens.need("features"),
            tokens.need("encoder_features"),
            tokens.need("projector"),
        )
        if encoded.shape[1] != tokens.count:
            raise UnsupportedError(
                f"visionzip merges before the projector, but {encoded.shape[1]} patches become "
                f"{tokens.count} tokens in this one"
            )
        cls_rows = tokens.need("cls_features") if self.cls == "token" else encoded[:, :0]  # (B, T, C)
        _, dominant, contextual = self.split(k, cls_rows.shape[1])
        groups = group(self.score(tokens), tokens.need("keys"), dominant, contextual)
        context = contextual_rows(encoded, groups, self.combine).to(encoded.dtype)
        made = project(torch.cat([cls_rows, context], dim=1))  # the projector works token by token
        rows = [made[:, : cls_rows.shape[1]], _rows(features, groups.dominant), made[:, cls_rows.shape[1] :]]
        no_place = groups.targets.new_full(cls_rows.shape[:2], -1)
        slots = torch.cat([no_place, groups.dominant, groups.targets], dim=1)
        return Merged(torch.cat(rows, dim=1), slots, context=torch.arange(k) >= k - contextual)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return unchecked.gather_rows([x], index)[0]
