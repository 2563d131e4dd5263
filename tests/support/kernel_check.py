# SPDX-License-Identifier: Apache-2.0
"""How an implementation of the kernels is held to ``vlmprune.kernels.reference``, on any device."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import InvariantError
from vlmprune.kernels import reference


@dataclass(frozen=True)
class KernelCase:
    op: str
    name: str
    make: Callable[[], tuple[Any, ...]]  # positional arguments
    options: dict[str, Any] = field(default_factory=dict)  # of the implementation, not of the meaning
    tolerance: float = 0.0  # relative, of floating-point answers
    slow: bool = False

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    def arguments(self) -> tuple[Any, ...]:
        """The same at every call."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(zlib.crc32(self.name.encode()))
            return self.make()


def to(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, list):
        return [to(item, device) for item in value]
    if not isinstance(value, Tensor):
        return value
    if value.is_contiguous() or device == value.device.type:
        return value.to(device)
    # the same strides there: views must be read as views
    moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return moved.copy_(value)


def tensors(answer: Any) -> list[Tensor]:
    if isinstance(answer, Tensor):
        return [answer]
    return [tensor for part in answer for tensor in tensors(part)]


def check(case: KernelCase, implementation: ModuleType, device: torch.device | str = "cpu") -> None:
    """Raise InvariantError where the implementation on ``device`` differs from the meaning on the CPU."""
    arguments = case.arguments()
    expected = tensors(getattr(reference, case.op)(*arguments))
    found = tensors(getattr(implementation, case.op)(*to(list(arguments), device), **case.options))
    compare(case, expected, found)


def compare(case: KernelCase, expected: list[Tensor], found: list[Tensor]) -> None:
    if len(expected) != len(found):
        raise InvariantError(f"{case}: {len(found)} tensors; expected {len(expected)}")
    for number, (want, got) in enumerate(zip(expected, found, strict=True)):
        got = got.cpu()
        if (got.shape, got.dtype) != (want.shape, want.dtype) or not got.is_contiguous():
            found_is = f"{got.dtype} {tuple(got.shape)}{'' if got.is_contiguous() else ', not contiguous'}"
            raise InvariantError(
                f"{case}: answer {number} is {found_is}; expected contiguous {want.dtype} {tuple(want.shape)}"
            )
        near = {"rtol": case.tolerance, "atol": case.tolerance * 1e-2, "equal_nan": True}
        if not (torch.allclose(got, want, **near) if got.is_floating_point() else torch.equal(got, want)):
            wrong = (got != want).nonzero()[:3].tolist()
            raise InvariantError(f"{case}: answer {number} is wrong, first at {wrong}")
