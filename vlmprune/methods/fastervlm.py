# SPDX-License-Identifier: Apache-2.0
"""FasterVLM: keep the patches that the [CLS] token of the vision encoder attends to.

Attention from text to image inside the language model is spread thin and drifts to late positions. That of
[CLS] is concentrated, and it is known before the language model starts.

    score_i = 1/H sum_h A[h, CLS, i]

with A the softmaxed attention of the layer whose output the projector reads, H heads and N patches i. The
softmax includes [CLS] itself; its entry is removed and the row is not renormalised.

Deviations: scores are averaged in float32 (half precision makes exact ties); the budget is floored, the paper
rounds; tiled images keep the layout of the checkpoint unless ``anyres="spatial"``; ``cls="mean"`` is ours.
Provenance: Zhang et al., "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM
Inference Faster", arXiv:2412.01818v1 (from v2 on, that id is another method); written from a description of
paper and official code (commit f5d5f12, Apache-2.0); no code copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.method import Method, Need
from ..core.tokens import VisualTokens
from ..registry import register
from .tower import attention_need, check_tower_options, patch_attention


@register("fastervlm")
@dataclass(frozen=True)
class FasterVLM(Method):
    """Ranks patches by the attention of [CLS], mean over heads.

    Args:
        cls: "token", or "mean": attention received from all patches, for towers without [CLS].
        layer: index into the hidden states of the tower, such as -2; None: the layer the model reads.
        anyres: "unpad": layout and newlines of the checkpoint; "spatial": the authors' LLaVA-NeXT layout
            (budget per raw tile, tiles interleaved, no newline).

    Example:
        ``vlmprune.select("fastervlm", keep=64, cls_attention=attention)``
    """

    cls: str = "token"
    layer: int | None = None
    anyres: str = "unpad"

    paper: ClassVar[str] = "arXiv:2412.01818v1"
    licence: ClassVar[str] = "Apache-2.0"

    def __post_init__(self) -> None:
        check_tower_options(self.cls, self.layer, self.anyres)
        if self.anyres == "spatial":
            # what the class says for all is another for this option; the instance is frozen
            object.__setattr__(self, "layout", "spatial")

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        return (attention_need(self.cls, self.layer),)

    def score(self, tokens: VisualTokens) -> Tensor:
        A = patch_attention(tokens, self.cls)  # (B, H, N)
        return A.mean(dim=1)
