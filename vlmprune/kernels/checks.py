# SPDX-License-Identifier: Apache-2.0
"""Input of the kernels, refused by name: ranks, shapes, dtypes, devices, budgets, indices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import InvariantError, SpecError, did_you_mean

PLAIN = (Tensor, nn.Parameter)  # not what a fake mode or a subclass puts in their place


def described(value: object) -> str:
    return (
        f"{value.dtype} of shape {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else f"a {type(value).__name__}"
    )


def tensor(
    name: str, value: object, ranks: tuple[int, ...], expected: str, like: Tensor | None = None
) -> None:
    """A real tensor of one of the ranks, on the device of ``like``."""
    if not isinstance(value, Tensor) or value.ndim not in ranks or value.is_complex():
        raise InvariantError(f"{name} is {described(value)}; expected {expected}")
    if like is not None and value.device != like.device:
        raise InvariantError(
            f"{name} is on {value.device}, and the other tensors are on {like.device}; move it there"
        )


def shape(name: str, value: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(value.shape[: len(expected)]) != tuple(expected):
        raise InvariantError(
            f"{name} is {described(value)}; expected a shape of {_pattern(expected, value.ndim)}"
        )


def _pattern(expected: tuple[int, ...], rank: int) -> str:
    return f"({', '.join([str(size) for size in expected] + ['*'] * (rank > len(expected)))})"


def count(name: str, value: object) -> None:
    # True is an int to Python; sizes are SymInt while a model is compiled
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt) or value < 0:
        raise InvariantError(f"{name}={value!r}; expected an integer from 0 on")


def listed(name: str, xs: object) -> None:
    if not isinstance(xs, list | tuple):
        raise InvariantError(f"{name} is {described(xs)}; expected a list of tensors: write [x] for one")


def rows(name: str, xs: Sequence[object], lead: tuple[int, ...], like: Tensor) -> None:
    """A list of tensors whose shapes begin with ``lead``."""
    listed(name, xs)
    rank, device = len(lead), like.device
    for at, x in enumerate(xs):
        # asked before every kernel: one test of what is right, and the reasons only for what is not
        if isinstance(x, Tensor) and x.shape[:rank] == lead and x.device == device:
            continue
        if not isinstance(x, Tensor) or x.ndim < rank:
            raise InvariantError(
                f"{name}[{at}] is {described(x)}; expected a tensor of shape {_pattern(lead, len(lead) + 1)}"
            )
        if x.device != like.device:
            raise InvariantError(
                f"{name}[{at}] is on {x.device}, and the other tensors are on {like.device}; move it there"
            )
        shape(f"{name}[{at}]", x, lead)


def integers(name: str, value: Tensor, rank: int, expected: str, like: Tensor) -> None:
    tensor(name, value, (rank,), expected, like)
    if value.dtype not in (torch.int32, torch.int64):
        raise InvariantError(f"{name} is {described(value)}; expected int32 or int64, {expected}")


def floating(name: str, value: Tensor) -> None:
    if not value.is_floating_point():
        raise InvariantError(f"{name} is {described(value)}; expected floating point numbers")


def choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise SpecError(
            f"{name}={value!r}; expected one of {', '.join(known)}.{did_you_mean(str(value), known)}"
        )


def _unseen(x: Tensor) -> bool:
    """Whether reading values would synchronise the device, or is impossible while compiling."""
    return torch.compiler.is_compiling() or x.device.type != "cpu" or type(x) not in PLAIN


def inside(idx: Tensor, n: int, least: int = 0) -> None:
    """Indices lie in ``least`` .. n-1; those of a GPU are trusted: looking at them would wait for it."""
    if _unseen(idx) or idx.numel() == 0:
        return
    low, high = (int(edge) for edge in idx.aminmax())
    if low < least or high >= n:
        raise InvariantError(f"idx reaches from {low} to {high}; expected rows in {least}..{n - 1}")


def not_negative(name: str, value: Tensor) -> None:
    """Numbers from 0 on; those of a GPU are trusted."""
    if not _unseen(value) and bool((value < 0).any()):
        # the least of numbers that hold a NaN is NaN, which names no culprit
        raise InvariantError(f"{name} holds {float(value.nan_to_num(0).min())}; expected numbers from 0 on")
