# SPDX-License-Identifier: Apache-2.0
"""What families share that make one token of the patches of a square: geometry, and their projectors.

Which patches those are differs in two ways: they stand row by row as in the picture, or those of a token
follow each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .base import Adapter, Modality, Part


class MergingAdapter(Adapter):
    """Base of families with ``merge`` x ``merge`` patches to a token.

    As it is for patches that stand row by row.
    """

    @property
    def merge(self) -> int:
        """Patches along each side of a token."""
        raise NotImplementedError

    def pack(self, modality: Modality, crops: Tensor, number: int, arguments: Mapping[str, Any]) -> Tensor:
        return averaged(crops, self.grid(modality, number, arguments), self.merge)

    def projects_tokens(self, modality: Modality) -> bool:
        return True

    def grids(
        self, modality: Modality, special: Tensor, crops: int, grid: tuple[int, int]
    ) -> tuple[tuple[int, int], ...]:
        rows, cols = (n // self.merge for n in grid)
        return ((rows, cols),) * crops


def averaged(crops: Tensor, grid: tuple[int, int], merge: int, *, filled: bool = False) -> Tensor:
    """(crops, n, channels) patches row by row -> (tokens, channels), the mean of the patches of each token.

    Args:
        filled: the last token of a row or column has fewer patches where its side does not divide.
    """
    cells = crops.transpose(1, 2).unflatten(2, grid)  # (crops, channels, rows, cols)
    pooled = nn.functional.avg_pool2d(cells, merge, ceil_mode=filled)
    return pooled.flatten(2).transpose(1, 2).flatten(0, 1)


def per_picture(packed: Tensor, lengths: Sequence[int], counts: Sequence[int]) -> list[Tensor]:
    """Rows (S, channels) of all pictures -> (crops, n, channels) of each: its length, in so many crops."""
    parts = packed.split(list(lengths))
    return [part.unflatten(0, (count, -1)) for part, count in zip(parts, counts, strict=True)]


class OfCells(nn.Module):
    """A part of a model as a function of the patches of a token: rows (..., merge**2 * C) to (..., D)."""

    def __init__(self, connector: nn.Module, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.connector: Part = connector
        self.call = call

    def forward(self, rows: Tensor) -> Tensor:
        return self.call(self.connector, rows)


def two_layers(connector: Any, rows: Tensor) -> Tensor:
    """Rows through a projector of two linear layers."""
    return connector.linear_2(connector.act(connector.linear_1(rows)))


def gated_layers(connector: Any, rows: Tensor) -> Tensor:
    """The same where half of the first layer's output is a gate on the other half."""
    value, gate = connector.linear_1(rows).chunk(2, dim=-1)
    return connector.linear_2(connector.act(gate) * value)


def normed_patches(norm: nn.LayerNorm, rows: Tensor) -> Tensor:
    """Rows (..., merge**2 * C) with a norm (C) of every patch in them."""
    return norm(rows.unflatten(-1, (-1, norm.normalized_shape[0]))).flatten(-2)
