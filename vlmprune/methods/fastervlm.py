# SPDX-License-Identifier: Apache-2.0
"""FasterVLM: keep the patches that the [CLS] token of the vision encoder attends to.

Zhang et al., "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference
Faster", arXiv:2412.01818v1 (from v2 on, that id is another method).

Deviations: scores are averaged in float32 (half precision makes exact ties); the budget is floored, the paper
rounds; tiled images keep the layout of the checkpoint unless ``anyres="spatial"``; ``cls="mean"`` is ours,
for towers without [CLS].
Provenance: written from a description of paper and official code (commit f5d5f12, Apache-2.0); no code
copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..checks import one_of
from ..core.method import Method, Need
from ..core.tokens import VisualTokens
from ..errors import SpecError
from ..registry import register


@register("fastervlm")
@dataclass(frozen=True)
class FasterVLM(Method):
    """Ranks patches by the attention of [CLS], mean over heads, at the layer whose output the projector
    reads.

    Args:
        cls: "token", or "mean": the attention a patch receives from all patches, for towers without [CLS].
        layer: index into the hidden states of the tower, such as -2; None: the layer the model takes its
            features from.
        anyres: "unpad" keeps un-padding and newlines as the checkpoint has them; "spatial" is the authors'
            LLaVA-NeXT layout (budget per raw tile, tiles interleaved, no newline).

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
            object.__setattr__(self, "layout", "spatial")

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        return (Need("cls_attention" if self.cls == "token" else "received_attention", self.layer),)

    def score(self, tokens: VisualTokens) -> Tensor:
        if self.cls == "mean":
            return tokens.need("received_attention").float()
        return tokens.need("cls_attention").float().mean(1)  # (B, H, N) -> (B, N)


def check_tower_options(cls: str, layer: int | None, anyres: str) -> None:
    """Raise unless the options shared by methods that read the vision tower have values that mean
    something."""
    one_of("cls", cls, ("token", "mean"))
    one_of("anyres", anyres, ("unpad", "spatial"))
    if layer is not None and (not isinstance(layer, int) or isinstance(layer, bool)):
        raise SpecError(
            f"layer={layer!r} is not a layer; expected None or an index into the hidden states such as -2"
        )
