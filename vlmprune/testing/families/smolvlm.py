# SPDX-License-Identifier: Apache-2.0
"""SmolVLM: Idefics3 with a tower class of its own."""

from __future__ import annotations

from typing import Any

from .base import OWN, Family
from .idefics3 import idefics
from .layouts import Nested
from .shared import MERGE


def config(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    return idefics("SmolVLM", text, layers, overrides)


FAMILY = Family("smolvlm", "SmolVLM", Nested(MERGE), (("own", "llama"),), config, towers=OWN)
