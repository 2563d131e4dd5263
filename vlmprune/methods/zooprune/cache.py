# SPDX-License-Identifier: Apache-2.0
"""What was computed of a projector, kept beside the model and made again when its weights change."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

Made = TypeVar("Made")


class _Known(NamedTuple):
    stamp: tuple[Any, ...]
    sample: Tensor
    facts: dict[Any, Any]


# weak: a projector that is gone takes its facts along
_KNOWN: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def remember(projector: nn.Module, key: Hashable, make: Callable[[], Made]) -> Made:
    """``make()``, once per projector and state of its weights."""
    weights = [weight.detach() for weight in projector.parameters()]
    # the sample: tensors made under inference_mode have no version, and writing through .data keeps it
    stamp = tuple(
        (w.data_ptr(), w.shape, w.dtype, None if w.is_inference() else w._version)
        for w in projector.parameters()
    )
    sample = torch.cat([w.flatten()[:: max(1, w.numel() // 64)].double() for w in weights])
    known = _KNOWN.get(projector)
    if known is None or known.stamp != stamp or not torch.equal(known.sample, sample):
        # weights have changed: all that was made of the old ones is forgotten
        known = _KNOWN[projector] = _Known(stamp, sample, {})
    if key not in known.facts:
        known.facts[key] = make()
    return known.facts[key]
