# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-Omni and Qwen3-Omni in vLLM, their thinkers: pictures as in Qwen-VL; sounds stay whole."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from vllm.model_executor.models import qwen2_5_omni_thinker as base
from vllm.model_executor.models import qwen3_omni_moe_thinker as experts
from vllm.multimodal import MULTIMODAL_REGISTRY

from ...errors import UnsupportedError
from ..request import Request
from .context import in_context
from .mrope import with_places
from .qwen_vl import OfQwen, PrunedQwen, PrunedWindows

WITH_SOUND = "use_audio_in_video"  # the option by which tokens of a clip take turns with those of its sound


class OfOmni(OfQwen):
    """What processors of both say alike."""

    def _request(self, inputs: Any) -> Request:
        if self.info.ctx.get_merged_mm_kwargs(inputs.hf_processor_mm_kwargs).get(WITH_SOUND):
            raise UnsupportedError(
                f"{WITH_SOUND} lets tokens of a clip take turns with those of its sound, whose positions are "
                "not known here; leave it out, and send the sound beside the clip"
            )
        return super()._request(inputs)


class Heard(PrunedQwen):
    """Mixed in before both models: sounds have the positions of text."""

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        # one for all clips of a call; a request that asks for it was refused
        kwargs.pop(WITH_SOUND, None)
        rows = super().embed_multimodal(**kwargs)
        sounds = self._parse_and_validate_audio_input(**kwargs)
        if sounds is not None:
            found = self._process_audio_input(sounds)
            rows += [with_places(one, one.new_zeros(len(one), 3).long()) for one in found]
        return rows

    def spans(self, feature: Any, input_tokens: Any) -> Any:
        # the tokens of a sound are counted like words
        return () if feature.modality == "audio" else super().spans(feature, input_tokens)

    def _factor(self, seconds: float | None) -> float:
        return 1.0 if seconds is None else seconds * self.config.position_id_per_seconds


class Qwen25OmniProcessor(OfOmni, base.Qwen2_5OmniThinkerMultiModalProcessor):
    """The processor of Qwen2.5-Omni that promises fewer placeholders for images and clips."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen25OmniProcessor,
    info=in_context(base.Qwen2_5OmniThinkerProcessingInfo),
    dummy_inputs=base.Qwen2_5OmniThinkerDummyInputsBuilder,
)
class Qwen2_5OmniForConditionalGeneration(
    Heard, PrunedWindows, base.Qwen2_5OmniThinkerForConditionalGeneration
):
    """Qwen2.5-Omni."""


class Qwen3OmniProcessor(OfOmni, experts.Qwen3OmniMoeThinkerMultiModalProcessor):
    """The processor of Qwen3-Omni that promises fewer placeholders for images; clips were not measured."""

    counted: ClassVar[dict[str, str]] = {"image": "image_grid_thw"}


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3OmniProcessor,
    info=in_context(experts.Qwen3OmniMoeThinkerProcessingInfo),
    dummy_inputs=experts.Qwen3OmniMoeThinkerDummyInputsBuilder,
)
class Qwen3OmniMoeForConditionalGeneration(Heard, experts.Qwen3OmniMoeThinkerForConditionalGeneration):
    """Qwen3-Omni: the features of DeepStack follow the choice."""
