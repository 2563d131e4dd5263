# SPDX-License-Identifier: Apache-2.0
"""Which patches are padding, where a picture was padded to a centred square before it was cut into patches.

The margins follow from the size of the picture alone. Three published rules say what becomes of a patch that
is partly padding.
Provenance: written from a description of official code (intcomp/attention-bias, commit e75ebe7, Apache-2.0);
no code copied.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from PIL import Image
from torch import Tensor

RULES = ("area", "integer", "resize")


def real_patches(rule: str, side: int, size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """(side * side,) bool in raster order, False where a patch is padding.

    Args:
        rule: "area", "integer" or "resize".
        side: patches along each side of the square.
        size: (width, height) of the picture in pixels, before it was padded.
        threshold: share of its area that may be padding in a patch; read by "area" alone.
    """
    width, height = size
    if rule == "resize":
        return resized(side, width, height)
    short, long = sorted(size)
    real = by_area(side, short, long, threshold) if rule == "area" else by_whole_patches(side, short, long)
    along = torch.tensor(real)
    across = torch.ones(side, dtype=torch.bool)
    # wide pictures are padded above and below, tall ones on both sides
    rows, columns = (along, across) if width >= height else (across, along)
    return (rows[:, None] & columns).flatten()


def by_area(side: int, short: int, long: int, threshold: float) -> list[bool]:
    """Along the short axis: whether at most ``threshold`` of a patch is padding."""
    # in patches; exact, because shares equal to the threshold are common
    margin = Fraction(side * (long - short), 2 * long)
    share = [_within(margin - i) + _within(i + 1 - (side - margin)) for i in range(side)]
    return [padding <= Fraction(str(threshold)) for padding in share]


def _within(length: Fraction) -> Fraction:
    return min(max(length, Fraction(0)), Fraction(1))


def by_whole_patches(side: int, short: int, long: int) -> list[bool]:
    """Along the short axis: the same whole number of patches is padding at both ends."""
    margin = (side - short * side // long) // 2
    return [margin <= i < side - margin for i in range(side)]


def resized(side: int, width: int, height: int) -> Tensor:
    """(side * side,) bool: ones pasted on zeros like the picture, shrunk to one pixel per patch."""
    long = max(width, height)
    left, top = (long - width) // 2, (long - height) // 2
    square = Image.new("L", (long, long), 0)
    square.paste(1, (left, top, left + width, top + height))
    # Pillow averages around each patch and rounds the result to 0 or 1
    return torch.from_numpy(np.array(square.resize((side, side), Image.Resampling.BILINEAR)) > 0).flatten()
