# SPDX-License-Identifier: Apache-2.0
"""Checks of values that may be on a device: asking for a value there drains its queue, so that it is asked
for later.

On the CPU a check is made where it stands. On any other device its answer joins one flag, which is read where
the host waits for the device anyway. What a failed check would have spoiled is made NaN until then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import VlmPruneError

Explain = Callable[[], VlmPruneError]  # the error, made only where it is needed: it may read values
Require = Callable[[Tensor, Explain], None]  # raises the error, at once or later, unless the tensor is true


class Checks:
    """Makes every check at once: for callers that give plain tensors and wait for the answer.

    Attributes:
        lasting: whether a rule that held once is trusted for the rest of the process.
    """

    lasting: ClassVar[bool] = True

    def require(self, ok: Tensor, explain: Explain) -> None:
        """Raise the error unless ``ok``, a bool tensor with one element."""
        if not bool(ok):
            raise explain()

    def finite(self, values: Tensor, explain: Explain) -> None:
        """Raise the error where a value is NaN or infinite."""
        if values.numel() and not bool(magnitude(values) < torch.inf):
            raise explain()


MANY = 64  # checks that may wait: each holds what its error would tell, and is a launch in every answer


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A check whose answer is on a device: () bool, or () a magnitude that must be finite."""

    measured: Tensor
    explain: Explain

    def holds(self) -> bool:
        """Whether it holds; waits for the device."""
        return bool(self.measured if self.measured.dtype == torch.bool else self.measured < torch.inf)


class DeferredChecks(Checks):
    """Makes checks on the CPU at once, and gathers those on a device.

    Attributes:
        waiting: those that were not read yet, oldest first.
    """

    def __init__(self) -> None:
        self.waiting: list[_Waiting] = []

    def require(self, ok: Tensor, explain: Explain) -> None:
        if ok.device.type != "cpu":
            self.waiting.append(_Waiting(ok.detach().reshape(()), explain))
        elif not bool(ok):
            raise explain()

    def finite(self, values: Tensor, explain: Explain) -> None:
        if not values.numel():
            return
        largest = magnitude(values)
        if values.device.type != "cpu":
            self.waiting.append(_Waiting(largest, explain))
        elif not bool(largest < torch.inf):  # NaN is less than nothing
            raise explain()

    def __bool__(self) -> bool:
        """Whether checks wait for their answer."""
        return bool(self.waiting)

    def _zero_or_nan(self, device: torch.device) -> Tensor:
        """() float on ``device``: 0 if all is well so far, else NaN; a launch per check and one more."""
        measured = [one.measured.to(device) for one in self.waiting]
        answers = [one for one in measured if one.dtype == torch.bool]
        magnitudes = [one for one in measured if one.dtype != torch.bool]
        if magnitudes:  # the largest of them is NaN where one is; infinity less itself is NaN
            many = len(magnitudes) > 3  # two launches then, in place of one for each but the first
            largest = torch.stack(magnitudes).amax() if many else reduce(torch.maximum, magnitudes)
            zero = largest - largest
        else:
            zero = answers[0] / answers[0] - 1  # 1 / 1 or 0 / 0
        for ok in answers:
            zero = zero / ok
        return zero

    def poison(self, hidden: Tensor) -> Tensor:
        """``hidden`` as it is, or NaN everywhere after a failed check: no wrong answer can pass."""
        return hidden + self._zero_or_nan(hidden.device) if self.waiting else hidden

    def settle(self) -> None:
        """Wait for the answers and raise the first error."""
        waiting, well = self.waiting, True
        if waiting:  # one wait where all is well
            well = bool(self._zero_or_nan(waiting[0].measured.device) == 0)
        self.waiting = []
        if not well:
            raise next(one.explain() for one in waiting if not one.holds())


NOW = Checks()


def magnitude(values: Tensor) -> Tensor:
    """() the largest magnitude, NaN or infinite where a value is. One launch; isfinite().all() takes four."""
    return torch.linalg.vector_norm(values.detach(), ord=torch.inf)


def all_finite(values: Tensor) -> Tensor:
    """() bool: no value is NaN or infinite."""
    if values.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=values.device)
    return magnitude(values) < torch.inf  # NaN is less than nothing
