# SPDX-License-Identifier: Apache-2.0
"""Launchers of the greedy kernels. Inputs are validated by the caller; values are float32, orders int32."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import RESIDUAL
from .triton_greedy import dpp_kernel, maxmin_kernel, nearest_kernel
from .triton_launch import MAX_BLOCK, block_of, launch, launch_steps, next_power_of_2, warps
from .triton_steps import dpp_step_kernel, maxmin_step_kernel

_HISTORY = (
    200 * 1024
)  # bytes of a decomposition that one program reads over and over; a longer one is worth a launch per pick
_DPP_BLOCK = 4096  # tokens that one program holds with rows of the decomposition; more spill
_DPP_ROWS = 8
_PROGRAMS = 1024  # per batch entry of a step: each reads what all of them left
_SIMILARITIES = 2**25  # held at a time, to find nearest neighbours by features
_TILE = 2048  # numbers of a tile of rows in registers


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _outputs(like: Tensor, k: int) -> tuple[Tensor, Tensor]:
    size = like.shape[0], min(k, like.shape[1])
    return torch.empty(size, dtype=torch.int32, device=like.device), torch.empty(
        size, dtype=torch.float32, device=like.device
    )


def _first_values(source: Tensor, weight: Tensor | None, first: str, features: bool) -> Tensor:
    """(B, N) what each token is worth as the first pick."""
    batch, n = source.shape[:2]
    if first == "argmax":
        return torch.ones(batch, n, dtype=torch.float32, device=source.device) if weight is None else weight
    if features:
        value = 1 - _nearest_by_features(source)
        return value if weight is None else weight * value
    value = torch.empty(batch, n, dtype=torch.float32, device=source.device)
    rows = 4
    block = min(1024, block_of(n))
    scale = value if weight is None else weight
    strides = source.stride(0), source.stride(1)
    launch(
        nearest_kernel,
        batch * -(-n // rows),
        source,
        scale,
        value,
        n,
        *strides,
        rows,
        block,
        weight is not None,
        num_warps=4,
    )
    return value


def _nearest_by_features(features: Tensor) -> Tensor:
    """(B, N) cosine of each token to its most similar other one; 0 for a token that is alone."""
    n = features.shape[1]
    if n == 1:
        return torch.zeros(features.shape[:2], dtype=torch.float32, device=features.device)
    found = []
    chunk = max(1, _SIMILARITIES // (features.shape[0] * n))
    for start in range(0, n, chunk):
        cosine = (features[:, start : start + chunk] @ features.transpose(1, 2)).float()  # (B, chunk, N)
        cosine.diagonal(start, dim1=1, dim2=2).fill_(-torch.inf)
        found.append(cosine.amax(-1))
    return torch.cat(found, dim=1)


def greedy_maxmin(
    sim: Tensor, k: int, weight: Tensor | None = None, first: str = "nn"
) -> tuple[Tensor, Tensor]:
    """Order of picks (B, min(k, N)) and what each was worth, by similarities (B, N, N); see
    ``reference.greedy_maxmin``.
    """
    batch, n = sim.shape[:2]
    if n > MAX_BLOCK:
        return _maxmin_steps(_rows_contiguous(sim), k, weight, first, features=False)
    sim, weight = _rows_contiguous(sim), None if weight is None else weight.contiguous()
    order, worth = _outputs(sim, k)
    start = _first_values(sim, weight, first, features=False)
    block = block_of(n)
    shape = (n, order.shape[1], sim.stride(0), sim.stride(1), block, weight is not None)
    scale = start if weight is None else weight
    launch(maxmin_kernel, batch, sim, scale, start, order, worth, *shape, num_warps=min(16, 2 * warps(block)))
    return order, worth


def greedy_maxmin_features(
    features: Tensor, k: int, weight: Tensor | None = None, first: str = "nn"
) -> tuple[Tensor, Tensor]:
    """``greedy_maxmin`` by features (B, N, D) of unit length: a launch per pick, and never an N x N
    matrix."""
    return _maxmin_steps(_rows_contiguous(features), k, weight, first, features=True)


class _Steps:
    """Shape of a launch per pick, and what the programs leave to each other."""

    def __init__(self, source: Tensor) -> None:
        batch, n = source.shape[:2]
        self.rows = min(256, max(16, next_power_of_2(-(-n // _PROGRAMS))))
        self.programs = -(-n // self.rows)
        self.tiles = self.rows, _TILE // self.rows, max(16, next_power_of_2(self.programs))
        self.grid = batch * self.programs
        self.left = torch.empty(2, 2 * self.grid, dtype=torch.int32, device=source.device).unbind()

        def state(dtype: torch.dtype) -> Tensor:
            return torch.empty(batch, n, dtype=dtype, device=source.device)

        self.taken = state(torch.int8)
        self.state = state

    def sizes(self, source: Tensor, k: int) -> tuple[int, ...]:
        return source.shape[1], k, 0, self.programs, source.shape[2], source.stride(0), source.stride(1)


def _maxmin_steps(
    source: Tensor, k: int, weight: Tensor | None, first: str, features: bool
) -> tuple[Tensor, Tensor]:
    weight = None if weight is None else weight.contiguous()
    order, worth = _outputs(source, k)
    start = _first_values(source, weight, first, features)
    steps = _Steps(source)
    scale = start if weight is None else weight
    best = steps.state(torch.float32)
    args = (
        source,
        scale,
        start,
        best,
        steps.taken,
        *steps.left,
        order,
        worth,
        *steps.sizes(source, order.shape[1]),
    )
    flags = (*steps.tiles, features, weight is not None)
    launch_steps(maxmin_step_kernel, steps.grid, order.shape[1] + 1, "step", *args, *flags, num_warps=4)
    return order, worth


def greedy_dpp(sim: Tensor, relevance: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Order of picks (B, min(k, N)) and the gain of each, by similarities (B, N, N); see
    ``reference.greedy_dpp``.
    """
    batch, n = sim.shape[:2]
    k = min(k, n)
    sim = _rows_contiguous(sim)
    if n > min(_DPP_BLOCK, MAX_BLOCK) or 4 * k * n > _HISTORY:
        return _dpp_steps(sim, relevance, k, features=False)
    order, gain = _outputs(sim, k)
    block = block_of(n)
    history = torch.empty(batch, k, block, dtype=torch.float32, device=sim.device)
    shape = (n, k, sim.stride(0), sim.stride(1), RESIDUAL, block, _DPP_ROWS)
    args = (sim, relevance.contiguous(), history, order, gain, *shape)
    launch(dpp_kernel, batch, *args, num_warps=8 if block < _DPP_BLOCK else 16)
    return order, gain


def greedy_dpp_features(features: Tensor, relevance: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``greedy_dpp`` by inner products of features (B, N, D): memory for N x k numbers, never an N x N
    matrix.
    """
    return _dpp_steps(_rows_contiguous(features), relevance, min(k, features.shape[1]), features=True)


def _dpp_steps(source: Tensor, relevance: Tensor, k: int, features: bool) -> tuple[Tensor, Tensor]:
    order, gain = _outputs(source, k)
    steps = _Steps(source)
    width = -(-k // steps.tiles[1]) * steps.tiles[1]
    history = torch.zeros(*source.shape[:2], width, dtype=torch.float32, device=source.device)
    state = steps.state(torch.float32), steps.state(torch.float32), steps.taken, history
    args = (
        source,
        relevance.contiguous(),
        *state,
        *steps.left,
        order,
        gain,
        *steps.sizes(source, k),
        width,
        RESIDUAL,
    )
    launch_steps(dpp_step_kernel, steps.grid, k + 1, "step", *args, *steps.tiles, features, num_warps=4)
    return order, gain
