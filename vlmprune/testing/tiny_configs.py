# SPDX-License-Identifier: Apache-2.0
"""Configs and classes of the tiny models; what differs between families is in ``families``."""

from __future__ import annotations

from typing import Any

import transformers
from transformers.utils import is_timm_available

from ..errors import UnsupportedError
from ..models import too_old
from .families import family_of

_OF_TIMM = ("fast_vlm", "gemma3n")  # families whose tower is one of timm


def tiny_config(family: str, tower: str, text: str, layers: int, overrides: dict[str, Any]) -> Any:
    """The config of a whole model."""
    facts = family_of(family)
    model_class(family)  # a clear error where it cannot be had
    kind = getattr(transformers, (facts.config_prefix or facts.prefix) + "Config")
    return kind(**facts.config(tower, text, layers, overrides))


def missing(family: str) -> str | None:
    """Why a family has no tiny model here: this transformers does not know it, or timm is not installed."""
    if not family_of(family).prefix:  # somebody else's
        return None
    name = class_name(family)
    if not hasattr(transformers, name):
        return f"transformers {transformers.__version__} has no {name}; install a newer one"
    if too_old(family, getattr(transformers, name)):
        return f"{family} needs a newer transformers than {transformers.__version__}; install the newest"
    if family in _OF_TIMM and not is_timm_available():
        return f"{family} needs timm and torchvision: pip install timm torchvision"
    return None


def model_class(family: str) -> Any:
    """The class of a family, or a clear error where it cannot be had."""
    reason = missing(family)
    if reason is not None:
        raise UnsupportedError(reason)
    return getattr(transformers, class_name(family))


def class_name(family: str) -> str:
    """The class of a family in transformers."""
    facts = family_of(family)
    return facts.model or facts.prefix + "ForConditionalGeneration"
