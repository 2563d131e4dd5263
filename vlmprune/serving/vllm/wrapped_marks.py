# SPDX-License-Identifier: Apache-2.0
"""Ovis2 in vLLM's wrapper of transformers: marks around and between tiles stand for visual words.

Transformers gives marks these words in every call that has pictures, vLLM's wrapper in none. Here every mark
of a prompt gets them: a part of a prompt is not told whether there is a picture in another part. A text
without pictures that has marks is therefore read otherwise than in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.models.transformers.multimodal import MultiModalDummyInputsBuilder
from vllm.multimodal import MULTIMODAL_REGISTRY

from .context import in_context
from .wrapped import TransformersMultiModalForCausalLM, WrappedInfo, WrappedProcessor


@MULTIMODAL_REGISTRY.register_processor(
    WrappedProcessor, info=in_context(WrappedInfo), dummy_inputs=MultiModalDummyInputsBuilder
)
class MarkedMultiModalForCausalLM(TransformersMultiModalForCausalLM):
    """A model of transformers whose last visual words are those of marks."""

    def _vocab_embeddings(self) -> set[nn.Embedding]:
        # rows of visual words are mixed, which vLLM's table of words cannot do
        return super()._vocab_embeddings() - {self.model.visual_embeddings_table}

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Sequence[Tensor] | None = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        # (L, D)
        rows: Any = super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)
        marks = self.config.visual_indicator_token_ids
        words = self.model.visual_embeddings_table.weight[-len(marks) :].to(rows)
        for token, word in zip(marks, words, strict=True):
            rows = torch.where((input_ids == token)[:, None], word, rows)
        return rows
