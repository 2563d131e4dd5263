# SPDX-License-Identifier: Apache-2.0
"""What several families refuse in the same words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..core.method import SlotName
from ..errors import CaptureError, UnsupportedError
from ..hooks.adapter import Modality


def closed_by_sharing(config: Any) -> Mapping[SlotName, str]:
    """Slots that are closed where layers read the keys of earlier ones, which a cut would miss."""
    if not getattr(config, "num_kv_shared_layers", 0):
        return {}
    return {"inside_lm": "whose last layers read the keys of earlier ones, which would not follow the cut"}


def refuse_clips(model_type: str, how: str, modality: Modality, arguments: Mapping[str, Any]) -> None:
    """Refuse clips where a family reads them in a way that this package does not follow."""
    if modality.name == "video" and arguments.get(modality.pixels) is not None:
        raise UnsupportedError(
            f"{model_type} {how}, which this package does not follow yet; give the frames as images, or run "
            "the clip dense"
        )


def check_beside(name: str, value: Any, shape: tuple[int, ...], what: str) -> None:
    """Refuse what stands beside pixels where it is missing or of another shape."""
    given = None if value is None else tuple(torch.as_tensor(value).shape)
    if given != shape:
        said = "is missing" if given is None else f"has shape {given}"
        raise CaptureError(f"{name} {said}; pass it as the processor returns it: {what}")
