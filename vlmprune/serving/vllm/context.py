# SPDX-License-Identifier: Apache-2.0
"""The context of a processor, with our words kept from the processor of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vllm.multimodal.processing import InputProcessingContext

from ..names import KEY, VERSION_KEY


class Context(InputProcessingContext):
    """Drops our words from the options, wherever vLLM merges those of the server with those of a request."""

    def get_merged_mm_kwargs(self, kwargs: Mapping[str, object], **options: Any) -> dict[str, Any]:
        merged = super().get_merged_mm_kwargs(kwargs, **options)
        return {key: value for key, value in merged.items() if key not in (KEY, VERSION_KEY)}


def in_context(build_info: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A maker of processing info that works in our context."""

    def build(context: Any) -> Any:
        return build_info(Context(context.model_config, context.tokenizer))

    return build
