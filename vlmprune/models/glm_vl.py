# SPDX-License-Identifier: Apache-2.0
"""GLM-4.1V, GLM-4.5V, GLM-4.6V, GLM-OCR: packed pictures, whose patches a convolution puts together."""

from __future__ import annotations

from .qwen_vl import Qwen2VLAdapter


class Glm4vAdapter(Qwen2VLAdapter):
    """Glm4vForConditionalGeneration; each frame of a clip is a picture of its own to the tower."""

    model_type = "glm4v"
    towers = ("glm4v", "glm4v_vision")
    merges_first = True


class Glm4vMoeAdapter(Glm4vAdapter):
    """Glm4vMoeForConditionalGeneration: the same with experts in the decoder."""

    model_type = "glm4v_moe"
    towers = ("glm4v_moe", "glm4v_moe_vision")


class Glm46VAdapter(Glm4vAdapter):
    """Glm46VForConditionalGeneration, with the tower of GLM-4.1V."""

    model_type = "glm46v"


class GlmOcrAdapter(Glm4vAdapter):
    """GlmOcrForConditionalGeneration."""

    model_type = "glm_ocr"
    towers = ("glm_ocr", "glm_ocr_vision")
