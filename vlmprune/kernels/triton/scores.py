# SPDX-License-Identifier: Apache-2.0
"""Scores of a row that depend on the whole row: one program walks over it, as often as it has to."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, next_power_of_2

_BLOCK = 1024  # tokens that a program holds at a time

# --- device ---------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n", "constant"])
def stretch_kernel(scores, out, n, constant, BLOCK: tl.constexpr):
    base = tl.program_id(0).to(tl.int64) * n
    lane = tl.arange(0, BLOCK)
    low = tl.full([BLOCK], float("inf"), tl.float32)
    high = tl.full([BLOCK], -float("inf"), tl.float32)
    wrong = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        valid = start + lane < n
        value = tl.load(scores + base + start + lane, mask=valid, other=0.0).to(tl.float32)
        # NaN is not equal to itself; minimum and maximum may pass it over
        wrong += (valid & ((value != value) | (tl.abs(value) == float("inf")))).to(tl.int32)
        low = tl.minimum(low, tl.where(valid, value, float("inf")))
        high = tl.maximum(high, tl.where(valid, value, -float("inf")))
    least = tl.min(low, 0)
    most = tl.max(high, 0)
    spread = most - least
    level = spread <= constant * most
    finite = tl.sum(wrong, 0) == 0
    for start in range(0, n, BLOCK):
        valid = start + lane < n
        value = tl.load(scores + base + start + lane, mask=valid, other=0.0).to(tl.float32)
        # rounded as IEEE says, as on the CPU: the plain operator may approximate
        value = tl.div_rn(value - least, spread + 1e-8 + tl.zeros_like(value))
        value = tl.where(finite, tl.where(level, 1.0, value), float("nan"))
        tl.store(out + base + start + lane, value, mask=valid)


@triton.jit
def fitted(scores, real, base, at, n, MASKED: tl.constexpr):
    """Scores at ``at`` in float64, their places in 0 .. 1, and which of them have a say in the fit."""
    valid = at < n
    a = tl.load(scores + base + at, mask=valid, other=0.0).to(tl.float32).to(tl.float64)
    used = valid & (a > 0)
    if MASKED:
        used = used & (tl.load(real + at, mask=valid, other=0) != 0)
    return a, at.to(tl.float64) / n, used


@triton.jit(do_not_specialize=["n"])
def detrend_kernel(scores, real, out, n, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """In float64, as the reference: sums over places cancel."""
    base = tl.program_id(0).to(tl.int64) * n
    lane = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, BLOCK):
        a, x, used = fitted(scores, real, base, start + lane, n, MASKED)
        count += used.to(tl.float64)
        total += tl.where(used, x, 0.0)
    centre = tl.sum(total, 0) / tl.maximum(tl.sum(count, 0), 1.0)
    along = tl.zeros([BLOCK], tl.float64)
    square = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, BLOCK):
        a, x, used = fitted(scores, real, base, start + lane, n, MASKED)
        dx = tl.where(used, x - centre, 0.0)
        along += dx * tl.log(tl.where(used, a, 1.0))
        square += dx * dx
    sigma = tl.sum(along, 0) / tl.maximum(tl.sum(square, 0), 1e-12)
    for start in range(0, n, BLOCK):
        a, x, used = fitted(scores, real, base, start + lane, n, MASKED)
        value = tl.where(a < 0, float("nan"), a * tl.exp(-sigma * x))
        tl.store(out + base + start + lane, value.to(tl.float32), mask=start + lane < n)


# --- host -----------------------------------------------------------------------------------------


def _block(n: int) -> int:
    return min(_BLOCK, max(128, next_power_of_2(n)))


def stretch(scores: Tensor, constant: float) -> Tensor:
    """(B, N) scores (B, N) stretched to [0, 1] in every row."""
    scores = scores.contiguous()
    batch, n = scores.shape
    out = torch.empty(batch, n, dtype=torch.float32, device=scores.device)
    launch(stretch_kernel, batch, scores, out, n, constant, _block(n), num_warps=4)
    return out


def detrend(scores: Tensor, real: Tensor | None = None) -> Tensor:
    """(B, N) scores (B, N) without the trend of places where they are positive and ``real`` (N,)."""
    scores = scores.contiguous()
    batch, n = scores.shape
    out = torch.empty(batch, n, dtype=torch.float32, device=scores.device)
    # a pointer that nothing reads where all places are real; bool as bytes, which every Triton loads
    mask = scores if real is None else real.contiguous().view(torch.int8)
    launch(detrend_kernel, batch, scores, mask, out, n, real is not None, _block(n), num_warps=8)
    return out
