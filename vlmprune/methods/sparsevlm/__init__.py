# SPDX-License-Identifier: Apache-2.0
"""SparseVLM and SparseVLM+: three cuts ranked by the text tokens that are about the picture.

Few words of a question are about the picture. Those raters are chosen once, from the input embeddings. At
three layers the patches that they attend to are kept, and the best of the others become cluster means.

    affinity_j = mean over patches of softmax_j(V T^T)
    raters     = all j with affinity_j above the mean
    score_i    = mean over heads h and raters j of A[h, j, i]
    kept       = the k best patches; v1.5 adds cluster means of the best of the others (recycling.py)
    "plus":      A / w in place of A, the heads that attend to the picture most, nothing merged (plus.py)

with V the patches and T the text after the last picture as embeddings, A the attention of the layer.

Deviations: affinities, scores and clustering in float32; no noise in the clustering; every token after the
pictures rates where none stands out (one text token, for example); pictures are ranked one by one; budgets
scale with the number of patches; w has a floor above zero, where the official one turns negative.
Provenance: Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model
Inference", arXiv:2410.04417; written from a description of paper and official code (commits 91fb6d9, 26a5f48,
Apache-2.0); no code copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ...checks import check_ids, check_int, check_layers, one_of
from ...core.budget import Budget
from ...core.method import CutPoint, Merged, Method, SlotName, What
from ...core.tokens import VisualTokens
from ...errors import SpecError, UnsupportedError
from ...registry import register
from ..depths import scaled_layers
from .plus import corrected, top_head_scores
from .raters import rated, rater_affinity
from .recycling import cluster_count, kept_of, pick, recycle
from .schedule import DEPTH, LAYERS, PATCHES, published_rows


@register("sparsevlm")
@dataclass(frozen=True)
class SparseVLM(Method):
    """Keeps patches that the text about the picture attends to, at three layers, and merges some others.

    Args:
        version: "v1.5": recycling, positions are re-counted; "plus": no recycling, positions stay, attention
            is divided by the bias of rotary positions, only the heads that attend to the picture most count.
        layers: three layers after which patches are cut; None: (2, 6, 15), or as deep in shallower models.
        recycle: merge a part of the cut patches into clusters (v1.5).
        heads: how many heads count (plus); None: half of them. The official code has 14 of 28.
        skip: ids of tokens of the text that are no raters, such as those of stop words (RefAM).
    """

    version: str = "v1.5"
    layers: tuple[int, ...] | None = None
    recycle: bool = True
    heads: int | None = None
    skip: tuple[int, ...] = ()

    slot: ClassVar[SlotName] = "inside_lm"
    landing: ClassVar[tuple[str, int] | None] = ("layers", 0)
    query_aware: ClassVar[bool] = True
    nested: ClassVar[bool] = False  # later stages rank with layers that saw other tokens
    needs: ClassVar[tuple[What, ...]] = ("text_attention", "features")
    paper: ClassVar[str] = "arXiv:2410.04417"
    licence: ClassVar[str] = "Apache-2.0"

    def __post_init__(self) -> None:
        one_of("version", self.version, ("v1.5", "plus"))
        check_ids("skip", self.skip)
        object.__setattr__(self, "skips", self.skip)
        if self.version == "plus":
            # "plus" keeps positions, v1.5 counts them anew
            object.__setattr__(self, "positions", "original")
        if self.layers is not None:
            check_layers("layers", self.layers, first=0, count=3)  # budgets are published for three
        if self.heads is not None:
            check_int("heads", self.heads, least=1)
            if self.version != "plus":
                raise SpecError(
                    f"heads={self.heads} is for version='plus', this is {self.version!r}; drop it"
                )

    @property
    def recycles(self) -> bool:
        """Whether a part of what is cut is merged."""
        return self.recycle and self.version != "plus"

    def cuts(self, depth: int, budget: Budget | None, count: int) -> tuple[CutPoint, ...]:
        if budget is None:
            raise SpecError("sparsevlm needs a budget: sparsevlm@192 is the published setting of that name")
        # deeper models are cut where the published one is
        layers = self.layers or scaled_layers(LAYERS, DEPTH, min(depth, DEPTH))
        if layers[-1] + 1 >= depth:
            raise SpecError(
                f"layers={layers} are cut after, but the language model has layers 0..{depth - 1}; choose "
                "smaller ones"
            )
        # tables are of 576 patches: the share is looked up there, and the answer scaled to this picture
        rows = published_rows(budget.count(count) / count * PATCHES, self.recycles)
        found, n = [], count
        for layer, row in zip(layers, rows, strict=True):
            kept = max(1, round(row * count / PATCHES))
            if kept < n:
                # what is recycled goes on as well, so that the next cut starts from more rows than were kept
                n = kept + (cluster_count(n - kept) if self.recycles else 0)
            found.append(CutPoint(layer + 1, n, source=layer))
        return tuple(found)

    def check_model(self, config: Any) -> None:
        rope = getattr(getattr(config, "text_config", None), "rope_parameters", None) or {}
        if self.version == "plus" and "mrope_section" in rope:
            raise UnsupportedError(
                "sparsevlm(version=plus) divides by a bias of positions in a sequence, but tokens of "
                f"{config.model_type} have 2-D (M-RoPE) positions: use sparsevlm(version=v1.5)"
            )

    def raters(self, text: Tensor, visual: Tensor) -> Tensor:
        affinity = rater_affinity(text, visual)  # (T,)
        chosen = affinity > affinity.mean()
        # all of them where none stands out, said on the device: an ``if`` would wait for it
        return chosen | ~chosen.any()

    def score(self, tokens: VisualTokens) -> Tensor:
        A = tokens.need("text_attention").float()  # (B, H, R, N)
        if self.version == "v1.5":
            return rated(A, tokens.query_mask).mean(dim=1)
        # A / w, and of all heads those that attend to the picture most
        f = tokens.need("rotary_frequencies")
        A = corrected(A, tokens.need("query_positions"), tokens.need("positions"), f)
        return top_head_scores(A, tokens.query_mask, self.heads)

    def merge(self, tokens: VisualTokens, k: int) -> Merged:
        return self.merge_ranked(tokens, k, self.score(tokens))

    def merge_ranked(self, tokens: VisualTokens, k: int, ranking: Tensor) -> Merged:
        """Keeps the best of ``ranking`` (B, N); the method's own scores say what is recycled."""
        features = tokens.need("features")
        if not self.recycles:
            return pick(features, ranking, k)
        # k is kept patches and clusters together
        return recycle(features, self.score(tokens), kept_of(tokens.count, k), ranking)
