# SPDX-License-Identifier: Apache-2.0
"""Cosmos 3 Omni in vLLM: what reads pictures and clips is Qwen3-VL; what makes them is not loaded."""

from __future__ import annotations

from vllm.model_executor.models import cosmos3, qwen3_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from .context import in_context
from .qwen3_vl import PrunedQwen3, Qwen3VLProcessor


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor,
    info=in_context(cosmos3.Cosmos3ProcessingInfo),
    dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder,
)
class Cosmos3ForConditionalGeneration(PrunedQwen3, cosmos3.Cosmos3ForConditionalGeneration):
    """Cosmos 3 Omni."""
