# SPDX-License-Identifier: Apache-2.0
"""Checks of values that may be on a device: asking for a value there drains its queue, so that it is asked
for later.

On the CPU a check is made where it stands. On any other device its answer joins one flag, which is read where
the host waits for the device anyway. What a failed check would have spoiled is made NaN until then.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import VlmPruneError

Explain = Callable[[], VlmPruneError]  # the error, made only where it is needed: it may read values
Require = Callable[[Tensor, Explain], None]  # raises the error, at once or later, unless the tensor is true


class Checks:
    """Makes every check at once: for callers that give plain tensors and wait for the answer."""

    def require(self, ok: Tensor, explain: Explain) -> None:
        """Raise the error unless ``ok``, a bool tensor with one element."""
        if not bool(ok):
            raise explain()


class DeferredChecks(Checks):
    """Makes checks on the CPU at once, and gathers those on a device."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Explain]] = []

    def require(self, ok: Tensor, explain: Explain) -> None:
        if ok.device.type == "cpu":
            super().require(ok, explain)
        else:
            self._waiting.append((ok.detach(), explain))

    def __bool__(self) -> bool:
        """Whether checks wait for their answer."""
        return bool(self._waiting)

    def flag(self) -> Tensor:
        """() bool on the device: all is well so far."""
        return torch.stack([ok.reshape(()) for ok, _ in self._waiting]).all()

    def poison(self, hidden: Tensor) -> Tensor:
        """``hidden`` as it is, or NaN everywhere after a failed check: no wrong answer can pass."""
        if not self._waiting or self._waiting[0][0].device != hidden.device:
            return hidden
        return hidden.masked_fill(~self.flag(), torch.nan)

    def settle(self) -> None:
        """Wait for the answers and raise the first error."""
        waiting, self._waiting = self._waiting, []
        if waiting and not bool(torch.stack([ok.reshape(()) for ok, _ in waiting]).all()):
            raise next(explain() for ok, explain in waiting if not bool(ok))


NOW = Checks()


def all_finite(values: Tensor) -> Tensor:
    """() bool: no value is NaN or infinite. Two launches on a device, where isfinite().all() takes five."""
    if values.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=values.device)
    return torch.linalg.vector_norm(values.detach(), ord=torch.inf) < torch.inf  # NaN is less than nothing
