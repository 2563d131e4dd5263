# SPDX-License-Identifier: Apache-2.0
"""Order of kept rows over the tiles of an any-resolution image, as FasterVLM and VisionZip lay them out.

This is the ``"spatial"`` layout: no un-padding and no newline embedding. It needs no model, only the patch of every row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InvariantError


def pack_tiles(slots: Tensor, tile_grid: tuple[int, int], side: int, interleave: Tensor | None = None) -> Tensor:
    """Order in which the language model reads the rows of all tiles of one image.

    1. The base tile, its rows unchanged.
    2. The interleaved rows of the grid tiles, as one big image in raster order.
    3. Rows without a place of their own ([CLS]), tile by tile.
    4. The other rows (contextual tokens), tile by tile.

    Args:
        slots: (T, K) int64 patch index of every row inside its tile, -1 for a row without a place; tile 0 is the base tile,
            the others follow in row-major order.
        tile_grid: (tiles_w, tiles_h), so T = 1 + tiles_w * tiles_h.
        side: patches along each side of a tile.
        interleave: (K,) bool, rows that take part in the big image; default: all.

    Returns:
        (T*K,) int64 indices into the flattened rows; ``order // K`` is the tile, ``order % K`` the row.
    """
    tiles, rows = slots.shape
    wide, high = (int(n) for n in tile_grid)
    if tiles != 1 + wide * high:
        raise InvariantError(f"{tiles} tiles do not form a base tile and a {wide} x {high} grid; expected {1 + wide * high}")
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
