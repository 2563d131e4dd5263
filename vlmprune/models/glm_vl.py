# SPDX-License-Identifier: Apache-2.0
"""GLM-4.1V, GLM-4.5V, GLM-4.6V, GLM-OCR: packed pictures, whose patches a convolution puts together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Modality
from .qwen_vl import Qwen2VLAdapter
from .refusals import refuse_clips


class Glm4vAdapter(Qwen2VLAdapter):
    """Glm4vForConditionalGeneration; clips are refused, whose tokens stand at placeholders of images."""

    model_type = "glm4v"
    towers = ("glm4v", "glm4v_vision")
    merges_first = True

    def check(self, arguments: Mapping[str, Any], modality: Modality) -> None:
        how = "puts the frames of a clip at placeholders of images"
        refuse_clips(self.model_type, how, modality, arguments)
        super().check(arguments, modality)


class Glm4vMoeAdapter(Glm4vAdapter):
    """Glm4vMoeForConditionalGeneration: the same with experts in the decoder."""

    model_type = "glm4v_moe"
    towers = ("glm4v_moe", "glm4v_moe_vision")


class Glm46VAdapter(Glm4vAdapter):
    """Glm46VForConditionalGeneration, with the tower of GLM-4.1V."""

    model_type = "glm46v"


class GlmgaAdapter(Glm46VAdapter):
    """Checkpoints whose config says glmga; their class is that of GLM-4.6V."""

    model_type = "glmga"


class GlmOcrAdapter(Glm4vAdapter):
    """GlmOcrForConditionalGeneration."""

    model_type = "glm_ocr"
    towers = ("glm_ocr", "glm_ocr_vision")
