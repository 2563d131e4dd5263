# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5, VipLLaVA, Janus, DeepSeek-VL: one crop per image, patches in raster order."""

from __future__ import annotations

from .base import Adapter


class LlavaAdapter(Adapter):
    """LlavaForConditionalGeneration: a CLIP or SigLIP tower, a decoder that transformers makes masks for."""

    model_type = "llava"
    shortens = True


class VipLlavaAdapter(Adapter):
    """VipLlavaForConditionalGeneration: features of several layers side by side."""

    model_type = "vipllava"
    shortens = True

    @property
    def layers(self) -> list[int]:
        layer = getattr(self.config, "vision_feature_layers", None) or self.config.vision_feature_layer
        return [layer] if isinstance(layer, int) else list(layer)


class JanusAdapter(Adapter):
    """JanusForConditionalGeneration where it writes text; pictures that it draws are no part of a prompt."""

    model_type = "janus"
    shortens = True
    towers = ("janus_vision_model",)
    tower, connector = "vision_model", "aligner"


class DeepseekVLAdapter(Adapter):
    """DeepseekVLForConditionalGeneration."""

    model_type = "deepseek_vl"
    shortens = True
    towers = ("siglip_vision_model",)
    tower, connector = "vision_model", "aligner"
