# SPDX-License-Identifier: Apache-2.0
"""Copies on the CPU of what maps hold: a view would keep the caller's batch alive and change with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InvariantError, SpecError


def owned(name: str, value: Any, axes: tuple[int, ...] = (1,)) -> Tensor:
    """A copy of a tensor, or of lists, that has so many axes."""
    try:
        own = torch.as_tensor(value).detach().to("cpu", copy=True).contiguous()
    except (TypeError, ValueError, RuntimeError) as error:
        raise SpecError(f"{name} cannot be made a tensor ({error}); expected a vector of numbers") from error
    if own.ndim not in axes:
        expected = "one axis" if axes == (1,) else "one or two axes"
        raise SpecError(f"{name} has shape {tuple(own.shape)}; expected {expected}: take one row of a batch")
    return own


def owned_indices(name: str, value: Any, total: int) -> Tensor:
    """(k,) int64 copy of ascending distinct indices below ``total``."""
    idx = owned(name, value)
    if len(idx) and idx.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise SpecError(f"{name} is {idx.dtype}; expected integer indices (of a mask: mask.nonzero()[:, 0])")
    idx = idx.to(torch.int64)
    wrong = idx[(idx < 0) | (idx >= total)]
    if len(wrong) or (idx.diff() <= 0).any():
        what = f"{wrong.tolist()[:5]} out of range" if len(wrong) else "entries repeated or out of order"
        raise InvariantError(
            f"{name} has {what}; expected ascending distinct indices below {total}: sort them first"
        )
    return idx


def owned_scores(value: Any) -> Tensor:
    """(N,) float32 copy of finite scores."""
    scores = owned("scores", value)
    if scores.is_complex() or not scores.to(torch.float32).isfinite().all():
        raise InvariantError(
            f"scores of {len(scores)} tokens are not all finite in float32; fix the method that made them"
        )
    return scores.to(torch.float32)
