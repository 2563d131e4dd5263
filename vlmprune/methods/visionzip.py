# SPDX-License-Identifier: Apache-2.0
"""VisionZip: keep the patches [CLS] attends to, merge the rest into a few contextual tokens, keep [CLS].

A few patches receive nearly all attention of [CLS]: those are dominant. Of the rest, evenly spaced patches
become targets, and every other patch is averaged into the target with the most similar attention key.

    dominant  = the d largest sum_h A[h, CLS, i];   rest = all others in raster order, R of them
    target_j  = rest[j max(1, floor(R / c))],   j = 0 .. c-1
    join_i    = argmax_j cos(K_i, K_target_j)
    context_j = H_target_j + mean of H_i over join_i = j
    rows      = projector([CLS, H_dominant, context])

with A, K and H the attention, the keys (mean over heads) and the output of the layer the projector reads. The
steps from rest to join are ``contextual_groups`` in ``kernels/reference.py``, context is ``contextual_rows``.

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
from ..core.select import rows_at
from ..core.tokens import VisualTokens
from ..errors import SpecError, UnsupportedError
from ..kernels import dispatch
from ..registry import register
from .tower import attention_need, check_tower_options, patch_attention


class Groups(NamedTuple):
    """Where patches of a unit go: dominant ones are in slots ``first`` to ``start``, targets behind them."""

    slots: Tensor  # (B, K) patch of every row, -1 for those in front
    row: Tensor  # (B, N) of every patch, -1 where it is dropped
    first: int
    start: int

    @property
    def dominant(self) -> Tensor:
        """(B, d) patches, ascending."""
        return self.slots[:, self.first : self.start]

    @property
    def targets(self) -> Tensor:
        """(B, c) patches, ascending."""
        return self.slots[:, self.start :]


def group(scores: Tensor, keys: Tensor, dominant: int, contextual: int, first: int = 0) -> Groups:
    """Groups by scores (B, N) and keys (B, N, d); ``first`` rows stand in front."""
    kept = dispatch.topk_select(scores, dominant)
    slots, row = dispatch.contextual_groups(keys, kept, first, contextual)
    return Groups(slots, row, first, first + dominant)


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
        groups = group(self.score(tokens), tokens.need("keys"), dominant, contextual, first=crops)
        context = dispatch.contextual_rows(H, groups.slots, groups.row, groups.start, self.combine)
        # [CLS] rows and averages go through the projector together; dominant patches are there as features
        if self.place == "before":
            made = tokens.need("projector")(torch.cat([cls, context], dim=1))  # works token by token
            first, last = made[:, :crops], made[:, crops:]
        else:
            first, last = tokens.need("projector")(cls) if crops else cls, context
        rows = torch.cat([first, rows_at(features, groups.dominant), last], dim=1)
        # [CLS] has no place among the patches
        return Merged(rows, groups.slots, torch.arange(k) >= k - contextual, lambda: groups.row)

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
