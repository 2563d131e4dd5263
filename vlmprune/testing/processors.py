# SPDX-License-Identifier: Apache-2.0
"""Real HF processors, built offline, that fit the tiny models of ``vlmprune.testing.tiny``.

The tokenizer knows one id per byte, so it encodes any text; image processors need Pillow only.
"""

from __future__ import annotations

import inspect
from typing import Any

import transformers
from transformers.utils import is_torchvision_available

from ..errors import UnsupportedError
from .families import FAMILIES, family_of
from .families.shared import (
    BOS_ID,
    BYTES,
    EOS_ID,
    GRID,
    IMAGE_ID,
    IMAGE_SIZE,
    PAD_ID,
    PATCH_SIZE,
    SPECIAL_IDS,
    SQUARE,
    VIDEO_ID,
    VOCABULARY,
    tiny_tokenizer,
)

__all__ = [
    "BOS_ID",
    "BYTES",
    "EOS_ID",
    "GRID",
    "IMAGE_ID",
    "IMAGE_SIZE",
    "PAD_ID",
    "PATCH_SIZE",
    "PROCESSED",
    "SPECIAL_IDS",
    "VIDEO_ID",
    "VOCABULARY",
    "tiny_processor",
    "tiny_tokenizer",
]

# families that have a tiny processor
PROCESSED = tuple(name for name, family in FAMILIES.items() if family.processor is not None)

# line breaks inside expressions: jinja as transformers sets it up swallows one after a block
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] in ('image', 'video') %}{{ '<' + "
    "part['type'] + '>\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def tiny_processor(family: str = "llava", tower: str | None = None) -> Any:
    """The HF processor of a family, sized for ``tiny_model(family, tower)``.

    Without torchvision transformers has no video processors: families with clips then take pictures and text
    only (and cannot be saved); ``tiny_inputs(family, video=True)`` builds the tensors of clips by hand.
    """
    facts = family_of(family)
    tower = facts.tower(tower)
    if facts.processor is None:
        raise UnsupportedError(
            f"no tiny processor of {family}; build tensors with tiny_inputs, or use one of {[*PROCESSED]}"
        )
    kind = getattr(transformers, (facts.processor_prefix or facts.prefix) + "Processor")
    arguments = {"chat_template": _TEMPLATE, "tokenizer": tiny_tokenizer(), **facts.processor(tower)}
    return _build(kind, facts.prefix, arguments)


def _build(kind: Any, prefix: str, arguments: dict[str, Any]) -> Any:
    """A processor; for pictures and text only, where clips would need torchvision and it is missing."""
    if "video_processor" not in inspect.signature(kind.__init__).parameters:
        return kind(**arguments)
    if is_torchvision_available():
        size = {} if prefix.startswith("Qwen") else {"size": SQUARE}
        name = {"Qwen2_5_VL": "Qwen2VL"}.get(prefix, prefix) + "VideoProcessor"
        return kind(video_processor=getattr(transformers, name)(**size), **arguments)

    # transformers checks each part against its class; one that is missing counts as None
    class PicturesOnly(kind):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor" and argument is None:
                return type(None)
            return super().check_argument_for_proper_class(argument_name, argument)

    return PicturesOnly(video_processor=None, **arguments)
