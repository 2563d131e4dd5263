# SPDX-License-Identifier: Apache-2.0
"""PaliGemma and Gemma 3: some tokens attend both ways, by masks that the model makes of token types.

PaliGemma's whole prompt does, in Gemma 3 the tokens of one image do among themselves. After a cut the model's
own function makes these masks again, from the types of what is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from .base import IMAGE, Adapter, Modality
from .merging import OfCells


class PaliGemmaAdapter(Adapter):
    """PaliGemmaForConditionalGeneration, both generations: a square crop per image, in raster order."""

    model_type = "paligemma"
    shortens = True
    towers = ("siglip_vision_model",)
    view = "stretch"
    text_type = 1  # the answer; pictures and question are 0


def after_pooling(connector: Any, tokens: Tensor) -> Tensor:
    """What Gemma 3's projector does after it has averaged patches: each token (..., C) to (..., D)."""
    return connector.mm_soft_emb_norm(tokens) @ connector.mm_input_projection_weight


class Gemma3Adapter(Adapter):
    """Gemma3ForConditionalGeneration: patches are averaged, sixteen to a token as released, in the projector.

    The crops of an image (pan and scan) are pictures of their own: the model itself knows no more of them.
    """

    model_type = "gemma3"
    towers = ("siglip_vision_model",)
    view = "stretch"
    text_type = 0  # image tokens are 1
    one_size: ClassVar[str] = "makes as many tokens of every picture, and pan and scan adds crops of as many"
    of_frames: ClassVar[Mapping[str, object]] = {"do_pan_and_scan": False}

    def parts(self, processor: Any, picture: Any) -> int:
        # an option of the processor, whose default its image processor does not know; it is not everywhere
        # that transformers says it here
        if not getattr(processor, "images_kwargs", {"do_pan_and_scan": True})["do_pan_and_scan"]:
            return 1
        # only a processed picture says how many crops it has
        made = processor(images=[[picture]], text=[processor.boi_token], return_tensors="pt")
        return len(made[IMAGE.pixels])

    @property
    def read_by(self) -> nn.Module:
        return self.projector.connector.mm_soft_emb_norm  # the projector as a whole reads patches

    def _projector(self) -> nn.Module:
        return OfCells(self.inner.multi_modal_projector, after_pooling)

    def pack(self, modality: Modality, crops: Tensor, number: int, arguments: Mapping[str, Any]) -> Tensor:
        rows, cols = self.grid(modality, number, arguments)
        # (channels, rows, cols), as pooling takes it
        channels = crops[0].T.unflatten(1, (rows, cols))
        pooled = self.projector.connector.avg_pool(channels)
        return pooled.flatten(1).T

    def projects_tokens(self, modality: Modality) -> bool:
        return True

    def grids(
        self, modality: Modality, special: Tensor, crops: int, grid: tuple[int, int]
    ) -> tuple[tuple[int, int], ...]:
        side = self.projector.connector.tokens_per_side
        return ((side, side),)


class ShieldGemma2Adapter(Gemma3Adapter):
    """Checkpoints whose config says shieldgemma2, loaded to generate; their class is that of Gemma 3."""

    model_type = "shieldgemma2"
