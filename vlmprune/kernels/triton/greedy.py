# SPDX-License-Identifier: Apache-2.0
"""What the launchers of both greedy choices share: outputs, and the shape of a launch per pick.

With a launch per pick each program owns some tokens and leaves the best of them behind. In the next launch
all programs find the best of these. What a launch reads was written by the one before (two sets of leavings
take turns), so no program waits for another. Launch 0 prepares, launch ``step`` makes pick ``step - 1``, and
launch ``k`` makes the last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import next_power_of_2

_PROGRAMS = 1024  # per batch entry of a step: each reads what all of them left
_TILE = 2048  # numbers of a tile of rows in registers


def rows_contiguous(x: Tensor) -> Tensor:
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def outputs(like: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(B, k) int32 for the order, (B, k) float32 for what each pick is worth."""
    size = like.shape[0], min(k, like.shape[1])
    order = torch.empty(size, dtype=torch.int32, device=like.device)
    return order, torch.empty(size, dtype=torch.float32, device=like.device)


class Steps:
    """Shape of a launch per pick, and what the programs leave to each other."""

    def __init__(self, source: Tensor) -> None:
        batch, n = source.shape[:2]
        self.size = batch, n
        # of a program: enough that _PROGRAMS of them hold all tokens, within bounds
        self.rows = min(256, max(16, next_power_of_2(-(-n // _PROGRAMS))))
        self.programs = -(-n // self.rows)
        # ROWS, WIDTH and PARTIALS of the kernels
        self.tiles = self.rows, _TILE // self.rows, max(16, next_power_of_2(self.programs))
        self.grid = batch * self.programs
        # keys and tokens, for two sets of programs that take turns
        self.left = torch.empty(2, 2 * self.grid, dtype=torch.int32, device=source.device).unbind()
        self.taken = torch.empty(batch, n, dtype=torch.int8, device=source.device)

    def state(self) -> Tensor:
        """(B, N) numbers that one launch leaves to the next."""
        return torch.empty(self.size, dtype=torch.float32, device=self.taken.device)

    def sizes(self, source: Tensor, k: int) -> tuple[int, ...]:
        # the 0 is the step, which launch_steps counts up
        return source.shape[1], k, 0, self.programs, source.shape[2], source.stride(0), source.stride(1)
