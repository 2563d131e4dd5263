# SPDX-License-Identifier: Apache-2.0
"""VisionZip: keep the patches [CLS] attends to, merge the rest into a few contextual tokens, keep [CLS].

A few patches receive nearly all attention of [CLS]: those are dominant. Of the rest, evenly spaced patches
become targets, and every other patch is averaged into the target with the most similar attention key.

    dominant  = the d largest sum_h A[h, CLS, i];   rest = all others in raster order, R of them
    target_j  = rest[j max(1, floor(R / c))],   j = 0 .. c-1
    join_i    = argmax_j cos(K_i, K_target_j)
    context_j = H_target_j + mean of H_i over join_i = j
    rows      = projector([CLS, H_dominant, context])

with A, K and H the attention, the keys (mean over heads) and the output of the layer the projector reads.

``place="after"`` is for projectors that merge patches to tokens: there a token stands for its patches, with
the mean of their A and K, and H is the token as the language model gets it. Averages are made behind the
projector and not before it, because a merger reads patches in whole cells and only its output has one row
for each token.

Deviations: one budget is split into [CLS], dominant and contextual rows in the published proportion; sums and
cosines in float32; key norms are clamped, where the official code gives NaN for a zero key; the default
``combine="add"`` is the official code, "mean" the plain average that the method is described with;
``place="after"`` is in neither.
Provenance: Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models",
arXiv:2412.04467; written from a description of paper and official code (commit 3151f6d, Apache-2.0); no code
copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..checks import check_int, one_of
from ..core.method import Merged, Method, Need
from ..core.select import rest_of, rows_at, top_k
from ..core.tokens import VisualTokens
from ..errors import SpecError, UnsupportedError
from ..registry import register
from .tower import attention_need, check_tower_options, patch_attention


class Groups(NamedTuple):
    """Patch indices, ascending in every row."""

    dominant: Tensor  # (B, d)
    targets: Tensor  # (B, c)
    members: Tensor  # (B, R-c)
    join: Tensor  # (B, R-c) number of the target that a member joins


def group(scores: Tensor, keys: Tensor, dominant: int, contextual: int) -> Groups:
    """Dominant patches, targets and members by scores (B, N) and keys (B, N, d)."""
    batch, n = scores.shape
    kept = top_k(scores, dominant) if dominant else scores.new_empty(batch, 0, dtype=torch.int64)
    rest = rest_of(kept, n)  # (B, R) raster order
    if not contextual:
        return Groups(kept, rest[:, :0], rest[:, :0], rest[:, :0])
    step = max(1, rest.shape[1] // contextual)
    spaced = rest[:, : contextual * step].unflatten(1, (contextual, step))  # a target, then members
    targets = spaced[..., 0]
    members = torch.cat([spaced[..., 1:].flatten(1), rest[:, contextual * step :]], dim=1)
    K = torch.nn.functional.normalize(keys.float(), dim=-1)
    cosine = rows_at(K, members) @ rows_at(K, targets).transpose(1, 2)  # (B, R-c, c)
    return Groups(kept, targets, members, join=cosine.argmax(-1))


def contextual_rows(H: Tensor, groups: Groups, combine: str) -> Tensor:
    """(B, c, C) float32 contextual rows from the rows H (B, N, C) of the patches or tokens."""
    H_target, H_member = rows_at(H, groups.targets).float(), rows_at(H, groups.members).float()
    number = torch.arange(H_target.shape[1], device=H.device)
    joins = (groups.join[..., None] == number).float()  # (B, R-c, c); one_hot would wait for the GPU
    total, count = joins.transpose(1, 2) @ H_member, joins.sum(1)[..., None]
    if combine == "mean":
        return (H_target + total) / (1 + count)
    # a target that nothing joins stays as it is
    return H_target + total / count.clamp_min(1)


def joins_of(groups: Groups, first: int, n: int) -> Tensor:
    """(B, n) the row of every patch, where ``first`` rows stand before the dominant ones; -1 for none."""
    dominant, contextual = groups.dominant.shape[1], groups.targets.shape[1]
    found = torch.full((len(groups.dominant), n), -1, device=groups.dominant.device)
    number = torch.arange(first, first + dominant + contextual, device=found.device)
    own = torch.cat([groups.dominant, groups.targets], dim=1)
    found.scatter_(1, own, number.expand_as(own))
    return found.scatter_(1, groups.members, first + dominant + groups.join)


@register("visionzip")
@dataclass(frozen=True)
class VisionZip(Method):
    """Keeps [CLS] of every crop, dominant patches, and contextual tokens merged from the rest.

    ``keep`` counts all of these rows.

    Args:
        contextual: how many contextual tokens; None: 5/32 of the budget, so 10 of 64.
        combine: "add" (official: target + mean of its members) or "mean" (of target and members).
        cls: "token", or "mean" for towers without [CLS]: rank by received attention, no [CLS] row.
        layer: index into the hidden states of the tower, such as -2; None: the layer the model reads.
        anyres: "unpad", or "spatial", the authors' LLaVA-NeXT layout (budget per raw tile, no newline).
        place: average "before" the projector, or "after" it, for projectors that merge patches to tokens.
    """

    contextual: int | None = None
    combine: str = "add"
    cls: str = "token"
    layer: int | None = None
    anyres: str = "unpad"
    place: str = "before"

    nested: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv:2412.04467"
    licence: ClassVar[str] = "Apache-2.0"

    def __post_init__(self) -> None:
        check_tower_options(self.cls, self.layer, self.anyres)
        if self.anyres == "spatial":
            object.__setattr__(self, "layout", "spatial")
        one_of("combine", self.combine, ("add", "mean"))
        one_of("place", self.place, ("before", "after"))
        if self.contextual is not None:
            check_int("contextual", self.contextual, least=0)

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        found = [attention_need(self.cls, self.layer), Need("keys", self.layer), Need("features")]
        if self.cls == "token":
            found.append(Need("cls_features"))
        if self.place == "before":
            found.append(Need("encoder_features"))
        if self.place == "before" or self.cls == "token":
            found.append(Need("projector"))
        return tuple(found)

    def split(self, k: int, crops: int = 1) -> tuple[int, int, int]:
        """How many ([CLS], dominant, contextual) rows a budget of k buys a unit of ``crops`` crops."""
        cls_rows = crops if self.cls == "token" else 0
        room = k - cls_rows
        if room < (self.contextual or 0):
            fixed = f"{cls_rows} [CLS] rows and {self.contextual or 0} contextual tokens"
            least = cls_rows + (self.contextual or 0)
            raise SpecError(f"keep={k} is too small for the {fixed} of visionzip; keep at least {least}")
        contextual = self.contextual
        if contextual is None:  # at least one once a dominant patch has room
            contextual = min(max(1, round(k * 5 / 32)), max(0, room - 1))
        return cls_rows, room - contextual, contextual

    def score(self, tokens: VisualTokens) -> Tensor:
        A = patch_attention(tokens, self.cls)  # (B, H, N)
        return A.sum(dim=1)

    def merge(self, tokens: VisualTokens, k: int) -> Merged:
        features = tokens.need("features")  # (B, N, D)
        H = self._averaged(tokens)  # (B, N, C) before the projector, (B, N, D) behind it
        cls = tokens.need("cls_features") if self.cls == "token" else H[:, :0]  # (B, T, C)
        crops = cls.shape[1]
        _, dominant, contextual = self.split(k, crops)
        groups = group(self.score(tokens), tokens.need("keys"), dominant, contextual)
        context = contextual_rows(H, groups, self.combine).to(H.dtype)
        # [CLS] rows and averages go through the projector together; dominant patches are there as features
        if self.place == "before":
            made = tokens.need("projector")(torch.cat([cls, context], dim=1))  # works token by token
            first, last = made[:, :crops], made[:, crops:]
        else:
            first, last = tokens.need("projector")(cls) if crops else cls, context
        rows = [first, rows_at(features, groups.dominant), last]
        # [CLS] has no place among the patches
        no_place = groups.targets.new_full(cls.shape[:2], -1)
        slots = torch.cat([no_place, groups.dominant, groups.targets], dim=1)
        context_rows, count = torch.arange(k) >= k - contextual, features.shape[1]
        return Merged(torch.cat(rows, dim=1), slots, context_rows, lambda: joins_of(groups, crops, count))

    def _averaged(self, tokens: VisualTokens) -> Tensor:
        """(B, N, channels) what contextual rows are averages of."""
        if self.place == "after":
            return tokens.need("features")
        H = tokens.need("encoder_features")
        if H.shape[1] != tokens.count:
            raise UnsupportedError(
                f"visionzip merges before the projector, but {H.shape[1]} patches become "
                f"{tokens.count} tokens in this one; average behind it with place='after', e.g. "
                "visionzip(cls=mean,place=after)"
            )
        return H
