# SPDX-License-Identifier: Apache-2.0
"""SparseVLM and SparseVLM+: three cuts ranked by the text tokens that are about the picture, with recycling
of what is cut.

Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference",
arXiv:2410.04417.

Deviations: affinities, scores and clustering in float32; no noise in the clustering; every token after the
pictures rates where none stands out (one text token, for example); pictures are ranked one by one; budgets
scale with the number of patches; the gravity correction has a floor above zero, where the official one turns
negative.
Provenance: written from a description of paper and official code (commits 91fb6d9, 26a5f48, Apache-2.0); no
code copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...checks import one_of
from ...core.method import CutPoint, Merged, Method, What
from ...core.tokens import VisualTokens
from ...errors import SpecError, UnsupportedError
from ...kernels import unchecked
from ...registry import register
from .clustering import cluster_means, density_peaks

PATCHES, DEPTH, LAYERS = 576, 32, (2, 6, 15)
FLOOR = 0.01  # of the correction at distance 0; heads of 128 with base 1e4 reach it 1479 positions away
# keep -> patches that leave the three layers, of 576; 36 is what layers 0 and 1 of 32 alone come to
_RECYCLED = {
    36: (0, 0, 0),
    64: (66, 30, 17),
    96: (238, 48, 26),
    128: (303, 110, 36),
    192: (300, 200, 110),
    576: (576, 576, 576),
}
_PLAIN = {
    36: (0, 0, 0),
    64: (66, 34, 20),
    96: (246, 54, 28),
    128: (238, 108, 60),
    192: (300, 200, 118),
    576: (576, 576, 576),
}


@register("sparsevlm")
@dataclass(frozen=True)
class SparseVLM(Method):
    """Text tokens with an affinity to the picture above the mean rate its patches, at three layers; a part of
    the rest is merged.

    Args:
        version: "v1.5": recycling, positions are re-counted; "plus": no recycling, attention is divided by
            the bias of rotary positions, only the heads that look at the picture most count, positions stay.
        layers: three layers after which patches are cut; None: (2, 6, 15), or as deep in models of fewer than
            32 layers.
        recycle: merge a part of the cut patches into clusters (v1.5).
        heads: how many heads count (plus); None: half of them. The official code has 14, half of a model with
            28.
    """

    version: str = "v1.5"
    layers: tuple[int, ...] | None = None
    recycle: bool = True
    heads: int | None = None

    slot: ClassVar[str] = "inside_lm"
    query_aware: ClassVar[bool] = True
    nested: ClassVar[bool] = False  # later stages rank with layers that saw other tokens
    needs: ClassVar[tuple[What, ...]] = ("text_attention", "features")
    paper: ClassVar[str] = "arXiv:2410.04417"
    licence: ClassVar[str] = "Apache-2.0"

    def __post_init__(self) -> None:
        one_of("version", self.version, ("v1.5", "plus"))
        if self.version == "plus":
            object.__setattr__(self, "positions", "original")
        if self.layers is not None and (
            len(self.layers) != 3 or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0
        ):
            raise SpecError(
                f"layers={self.layers}; expected three ascending layers such as (2, 6, 15): budgets are "
                "published for three"
            )
        if self.heads is not None and (
            self.version != "plus" or type(self.heads) is not int or self.heads < 1
        ):
            raise SpecError(
                f"heads={self.heads!r} with version={self.version!r}; expected a number of heads from 1 on, "
                "and version='plus'"
            )

    @property
    def recycles(self) -> bool:
        """Whether a part of what is cut is merged."""
        return self.recycle and self.version != "plus"

    def cuts(self, depth: int, budget: Any, count: int) -> tuple[CutPoint, ...]:
        if budget is None:
            raise SpecError("sparsevlm needs a budget: sparsevlm@192 is the published setting of that name")
        layers = self.layers or scaled_layers(depth)
        if layers[-1] + 1 >= depth:
            raise SpecError(
                f"layers={layers} are cut after, but the language model has layers 0..{depth - 1}; choose "
                "smaller ones"
            )
        found, n = [], count
        for layer, row in zip(
            layers, published_rows(budget.count(count) / count * PATCHES, self.recycles), strict=True
        ):
            kept = max(1, round(row * count / PATCHES))
            if kept < n:
                n = kept + (cluster_count(n - kept) if self.recycles else 0)
            found.append(CutPoint(layer + 1, n, source=layer))
        return tuple(found)

    def check_model(self, config: Any) -> None:
        rope = getattr(getattr(config, "text_config", None), "rope_parameters", None) or {}
        if self.version == "plus" and "mrope_section" in rope:
            raise UnsupportedError(
                "sparsevlm(version=plus) divides by a bias of positions in a sequence, but tokens of "
                f"{config.model_type} have places in a picture: use sparsevlm(version=v1.5)"
            )

    def raters(self, text: Tensor, visual: Tensor) -> Tensor:
        affinity = rater_affinity(text, visual)
        chosen = affinity > affinity.mean()
        return chosen | ~chosen.any()

    def score(self, tokens: VisualTokens) -> Tensor:
        attention = tokens.need("text_attention").float()  # (B, H, R, N)
        if self.version == "v1.5":
            return rated(attention, tokens.query_mask).mean(dim=1)
        frequencies = tokens.need("rotary_frequencies")
        weight = rope_weight(tokens.need("query_positions"), tokens.need("positions"), frequencies)
        weight = weight.clamp_min(FLOOR * (2 * frequencies.shape[0]) ** 0.5)
        return top_head_scores(attention / weight[:, None], tokens.query_mask, self.heads)

    def merge(self, tokens: VisualTokens, k: int, ranking: Tensor | None = None) -> Merged:
        """Keeps the best of ``ranking`` (B, N), by default of the scores, which alone say what is
        recycled."""
        features, n = tokens.need("features"), tokens.count
        return recycle(
            features,
            self.score(tokens),
            kept_of(n, k) if self.recycles else k,
            ranking,
            recycles=self.recycles,
        )


def rater_affinity(text: Tensor, visual: Tensor) -> Tensor:
    """(T,) mean over patches (N, D) of their softmax over the text embeddings (T, D); it sums to 1."""
    return (visual.float() @ text.float().T).softmax(dim=1).mean(dim=0)


def rated(attention: Tensor, mask: Tensor | None) -> Tensor:
    """(B, H, N) attention (B, H, R, N), mean over the raters of the mask (B, R)."""
    if mask is None:
        return attention.mean(dim=2)
    real = mask[:, None, :, None].to(attention.dtype)
    return (attention * real).sum(dim=2) / real.sum(dim=2)


def rope_weight(query_positions: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """(B, R, N) logit of all-ones queries at (B, R) and all-ones keys at (B, N) under rotary embedding."""
    # the sum over k of cos((p - q) f_k), as a product of angles; in float64, where thousands of radians keep
    # their digits
    query, key = (p.double()[..., None] * frequencies.double() for p in (query_positions, positions))
    total = query.cos() @ key.cos().transpose(1, 2) + query.sin() @ key.sin().transpose(1, 2)
    return (2 / (2 * frequencies.shape[0]) ** 0.5 * total).float()


def top_heads(scores: Tensor, heads: int | None) -> Tensor:
    """(B, h) heads of scores (B, H, N) with the largest sum over patches, largest first; None: half of
    them."""
    count = max(1, scores.shape[1] // 2) if heads is None else heads
    if count > scores.shape[1]:
        raise SpecError(
            f"heads={count} but the language model has {scores.shape[1]}; choose fewer, or None for half of "
            "them"
        )
    return scores.sum(dim=-1).sort(dim=-1, descending=True, stable=True).indices[:, :count]


def top_head_scores(attention: Tensor, mask: Tensor | None, heads: int | None) -> Tensor:
    """(B, N) mean over the top heads and the raters of attention (B, H, R, N)."""
    per_head = rated(attention, mask)
    chosen = top_heads(per_head, heads)
    return per_head.gather(1, chosen[..., None].expand(-1, -1, per_head.shape[-1])).mean(dim=1)


def candidate_count(cut: int) -> int:
    """How many of the patches that are cut may be recycled."""
    return int(0.3 * cut) + 1


def cluster_count(cut: int) -> int:
    """How many rows they become."""
    return candidate_count(cut) // 10 + 1


def kept_of(n: int, rows: int) -> int:
    """Patches kept of n where kept patches and clusters are ``rows`` together; the most, where two numbers
    give the same.
    """
    fitting = [kept for kept in range(rows) if kept + cluster_count(n - kept) == rows]
    if not fitting:
        raise SpecError(
            f"keep={rows} of {n} tokens is too small for the {cluster_count(n)} recycled ones; keep more, or "
            "set recycle=False"
        )
    return fitting[-1]


def recycle(
    features: Tensor, scores: Tensor, kept: int, ranking: Tensor | None = None, *, recycles: bool = True
) -> Merged:
    """The ``kept`` tokens of features (B, N, D) that lead a ranking, in their order, then clusters of the
    others' best scores.
    """
    ranking = scores if ranking is None else ranking  # (B, N); the lower index wins ties
    keep = unchecked.topk_select(ranking, kept).long()
    rows = _rows(features, keep)
    if not recycles:
        return Merged(rows, keep)
    cut = features.shape[1] - kept
    clusters = cluster_count(cut)
    best = (
        scores.scatter(1, keep, -torch.inf)
        .sort(dim=-1, descending=True, stable=True)
        .indices[:, : candidate_count(cut)]
    )
    candidates = _rows(features, best).float()
    merged = cluster_means(candidates, density_peaks(candidates, clusters).assignment, clusters)
    no_place = keep.new_full((keep.shape[0], clusters), -1)
    return Merged(torch.cat([rows, merged.to(rows.dtype)], dim=1), torch.cat([keep, no_place], dim=1))


def published_rows(keep: float, recycled: bool) -> tuple[float, ...]:
    """Patches of 576 that leave the three layers for a mean of ``keep``: the published numbers, straight
    lines between them.
    """
    table = _RECYCLED if recycled else _PLAIN
    points = list(table)
    if keep <= points[0]:
        asked = f"keep asks for {keep / PATCHES:.3f} of the tokens on average"
        raise SpecError(
            f"{asked}, but {points[0] / PATCHES} is what the layers before the first cut read; keep more"
        )
    low, high = next((a, b) for a, b in pairwise(points) if keep <= b)
    share = (keep - low) / (high - low)
    return tuple(a + share * (b - a) for a, b in zip(table[low], table[high], strict=True))


def scaled_layers(depth: int) -> tuple[int, ...]:
    """(2, 6, 15), or the nearest layers as deep in a model of fewer than 32."""
    layers: list[int] = []
    for layer in LAYERS:
        scaled = layer if depth >= DEPTH else round(layer * depth / DEPTH)
        layers.append(max(scaled, layers[-1] + 1) if layers else scaled)
    return tuple(layers)


def rank_budget(attention: Tensor, scale: float, bias: float = 0.0) -> tuple[int, int]:
    """(rank, keep) of the first release: the rank of the raters' attention (R, N), mean over heads, times
    scale plus bias.
    """
    rank = int(torch.linalg.matrix_rank(attention.float()))
    return rank, min(int(rank * scale + bias), attention.shape[1] - 1)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return unchecked.gather_rows([x], index)[0]
