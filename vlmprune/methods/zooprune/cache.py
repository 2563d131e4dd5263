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

    def is_of(self, weights: list[Tensor]) -> bool:
        """Whether the weights still have the values of the sample; waits for their device."""
        return torch.equal(self.sample, sample_of(weights))


# weak: a projector that is gone takes its facts along
_KNOWN: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


class Compared:
    """The weights that one method object has compared by value, where a comparison waits for a device.

    That is done once, at the first prompt; afterwards addresses and version counters are compared. They tell
    of every change but one that is written through ``.data`` of a weight while the method is attached.
    """

    def __init__(self) -> None:
        self._seen: weakref.WeakKeyDictionary[nn.Module, tuple[Any, ...]] = weakref.WeakKeyDictionary()

    def knows(self, projector: nn.Module, stamp: tuple[Any, ...]) -> bool:
        """Whether weights with this stamp need no comparison; it is noted for the next time."""
        known = self._seen.get(projector) == stamp
        self._seen[projector] = stamp
        return known

    def __reduce__(self) -> tuple[type[Compared], tuple[()]]:
        # a copy, or another process, has compared nothing yet
        return Compared, ()


def remember(
    projector: nn.Module, key: Hashable, make: Callable[[], Made], compared: Compared | None = None
) -> Made:
    """``make()``, once per projector and state of its weights."""
    weights = [readable(weight) for weight in projector.parameters()]
    # tensors made under inference_mode have no version
    stamp = tuple(
        (w.data_ptr(), w.shape, w.dtype, None if w.is_inference() else w._version)
        for w in projector.parameters()
    )
    known = _KNOWN.get(projector)
    seen = compared is not None and compared.knows(projector, stamp)
    waits = any(weight.device.type != "cpu" for weight in weights)
    if known is None or known.stamp != stamp or not ((seen and waits) or known.is_of(weights)):
        # weights have changed: all that was made of the old ones is forgotten
        known = _KNOWN[projector] = _Known(stamp, sample_of(weights), {})
    if key not in known.facts:
        known.facts[key] = make()
    return known.facts[key]


def readable(weight: Tensor) -> Tensor:
    """A weight as plain numbers: torchao holds quantised ones in tensors that know little but products."""
    weight = weight.detach()
    return weight.dequantize() if type(weight).__module__.startswith("torchao.") else weight


def sample_of(weights: list[Tensor]) -> Tensor:
    """(S,) some values of all weights: writing through ``.data`` leaves their versions as they were."""
    return torch.cat([w.flatten()[:: max(1, w.numel() // 64)].double() for w in weights])
