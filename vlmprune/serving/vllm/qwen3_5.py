# SPDX-License-Identifier: Apache-2.0
"""Qwen3.5 in vLLM: pictures and clips as in Qwen3-VL, most decoder layers keep a running state."""

from __future__ import annotations

from vllm.model_executor.models import qwen3_5, qwen3_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from .context import in_context
from .qwen3_vl import PrunedQwen3, Qwen3VLProcessor


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor,
    info=in_context(qwen3_5.Qwen3_5ProcessingInfo),
    dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder,
)
class Qwen3_5ForConditionalGeneration(PrunedQwen3, qwen3_5.Qwen3_5ForConditionalGeneration):
    """Qwen3.5: there is no DeepStack."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor,
    info=in_context(qwen3_5.Qwen3_5MoeProcessingInfo),
    dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder,
)
class Qwen3_5MoeForConditionalGeneration(PrunedQwen3, qwen3_5.Qwen3_5MoeForConditionalGeneration):
    """The same with experts."""
