# SPDX-License-Identifier: Apache-2.0
"""Tiled pictures: the raw crops behind a picture, and the ``"spatial"`` layout that FasterVLM and VisionZip
give them.

The spatial layout has no un-padding and no newline embedding: a budget per raw crop, rows interleaved over
the tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.budget import Budget
from ...core.deferred import Checks
from ...core.method import Merged, Method, Need
from ...core.select import choose
from ...core.tokens import VisualTokens
from ...errors import InvariantError, UnsupportedError
from ...kernels import unchecked

FEATURES = Need("features")


@dataclass(frozen=True, eq=False)
class Tiles:
    """A picture before packing: T raw crops of n = rows * cols patches, the base crop first.

    Args:
        captured: (T, n, channels) per need, patches first; cls_features (T, 1, C).
        grid: rows and columns of one crop.
        layout: detail crops (across, down).
    """

    captured: Mapping[Need, Tensor]
    grid: tuple[int, int]
    layout: tuple[int, int]

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """The base crop, then the detail crops as one big raster."""
        (rows, cols), (across, down) = self.grid, self.layout
        return self.grid, (down * rows, across * cols)

    def in_picture(self, tile: int, patch: Tensor) -> Tensor:
        """Index in ``grids`` of the patches of a crop."""
        if tile == 0:
            return patch
        (rows, cols), across = self.grid, self.layout[0]
        row = (tile - 1) // across * rows + patch // cols
        return rows * cols + row * across * cols + (tile - 1) % across * cols + patch % cols


@dataclass(frozen=True, eq=False)
class SpatialRows:
    """What the spatial layout makes of a picture: its rows, and the patches kept of its tiles.

    Args:
        rows: (M, D).
        keep_idx: (K,) ascending, in the grids of the tiles.
    """

    rows: Tensor
    keep_idx: Tensor
    grids: tuple[tuple[int, int], ...]


def choose_in_tiles(
    tiles: Tiles,
    length: int,
    method: Method,
    budget: Budget,
    projector: Callable[[Tensor], Tensor] | None,
    checks: Checks,
) -> SpatialRows | None:
    """Spend a budget on every raw crop and interleave what is left; None where every patch is kept.

    Args:
        length: placeholder slots of the picture, which the rows must fit into.
    """
    if budget.scope != "crop":
        raise UnsupportedError(
            f"anyres='spatial' spends its budget per tile: write '@{budget.keep}/crop' instead of '@{budget}'"
        )
    side, features = tiles.grid, tiles.captured[FEATURES]
    count, n = features.shape[:2]
    k = budget.count(n)
    if k >= n:
        return None  # the checkpoint's own layout stays
    tokens = VisualTokens.of(
        tiles.captured, range(count), projector=projector, grids=(side,), size=(count, n), like=features
    )
    result = choose(method, tokens, k, checks)
    if isinstance(result, Merged):
        slots, rows = result.slots.cpu(), result.features
        context = None if result.context is None else ~result.context.cpu()
    else:
        slots, context = result.cpu(), None
        (rows,) = unchecked.gather_rows([features], result, ordered=True)
    order = pack_tiles(slots, tiles.layout, side[0], context)
    # the prompt has the places of the checkpoint's own layout, and none can be added here
    if order.shape[0] > length:
        raise UnsupportedError(
            f"anyres='spatial' makes {order.shape[0]} tokens but the prompt has {length} places; lower keep"
        )
    kept = [tiles.in_picture(tile, patches[patches >= 0]) for tile, patches in enumerate(slots)]
    return SpatialRows(rows.flatten(0, 1)[order.to(rows.device)], torch.cat(kept).unique(), tiles.grids)


def pack_tiles(
    slots: Tensor, tile_grid: tuple[int, int], side: int, interleave: Tensor | None = None
) -> Tensor:
    """Order in which the language model reads the rows of all tiles of one image.

    1. The base tile, its rows unchanged.
    2. The interleaved rows of the grid tiles, as one big image in raster order.
    3. Rows without a place of their own ([CLS]), tile by tile.
    4. The other rows (contextual tokens), tile by tile.

    Args:
        slots: (T, K) int64 patch index of every row inside its tile, -1 for a row without a place; tile 0 is
            the base tile, the others follow in row-major order.
        tile_grid: (tiles_w, tiles_h), so T = 1 + tiles_w * tiles_h.
        side: patches along each side of a tile.
        interleave: (K,) bool, rows that take part in the big image; default: all.

    Returns:
        (T*K,) int64 indices into the flattened rows; ``order // K`` is the tile, ``order % K`` the row.
    """
    tiles, rows = slots.shape
    wide, high = (int(n) for n in tile_grid)
    if tiles != 1 + wide * high:
        raise InvariantError(
            f"{tiles} tiles do not form a base tile and a {wide} x {high} grid; expected {1 + wide * high}"
        )
    # a row without a token has no place in the big image
    in_place = slots >= 0  # (T, K)
    if interleave is not None:
        in_place = in_place & interleave.to(slots.device)
    tile = torch.arange(tiles - 1, device=slots.device)[:, None]
    patch = slots[1:]
    y = tile // max(wide, 1) * side + patch // side
    x = tile % max(wide, 1) * side + patch % side
    area = (tiles - 1) * side * side
    key = torch.where(in_place[1:], y * (wide * side) + x, area + (patch >= 0).long())  # (T-1, K)
    order = torch.argsort(key.flatten(), stable=True)  # equal keys stay tile by tile
    return torch.cat([torch.arange(rows, device=slots.device), rows + order])
