# SPDX-License-Identifier: Apache-2.0
"""Where the object asked about lies among the patches: for looking why a method answers well or badly, never for choosing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..core.keepmap import KeepMap
from ..errors import EvaluationError

COVERED = 0.1  # share of a patch that the object must cover for the patch to count as lying on it


def on_object(sample: Any, maps: Sequence[KeepMap]) -> float | None:
    """Share of the kept tokens of all images of a sample that lie on the object asked about; None where there is none."""
    masks = sample.object_masks()
    if not maps or masks is None or all(mask is None for mask in masks):
        return None
    if len(masks) != len(maps):
        raise EvaluationError(f"{sample.id}: {len(masks)} object masks for {len(maps)} images; expected one (or None) per image")
    kept = sum(map(len, maps))
    hits = sum(int(patches_on(mask, one)[one.keep_idx].sum()) for mask, one in zip(masks, maps, strict=True) if mask is not None)
    return hits / kept if kept else None


def patches_on(mask: Any, where: KeepMap) -> np.ndarray:
    """(N,) bool, the patches of a map that the mask (height, width) covers enough."""
    return covered_share(mask, where.boxes, where.view) >= COVERED


def covered_share(mask: Any, boxes: Tensor, view: str) -> np.ndarray:
    """(N,) share of every box that is covered by the mask (height, width); boxes in [0, 1] of the view."""
    mask = np.asarray(mask, dtype=bool)
    if mask.ndim != 2:
        raise EvaluationError(f"an object mask has shape {mask.shape}; expected (height, width)")
    if view == "center":
        side = min(mask.shape)
        top, left = ((length - side) // 2 for length in mask.shape)
        mask = mask[top : top + side, left : left + side]
    # sums over whole pixels up to each corner, interpolated between corners: exact areas of boxes that cut through pixels
    total = np.pad(mask.cumsum(0).cumsum(1), ((1, 0), (1, 0))).astype(float)
    x0, y0, x1, y1 = (boxes.double().numpy() * np.tile([mask.shape[1], mask.shape[0]], 2)).T
    area = _at(total, y1, x1) - _at(total, y0, x1) - _at(total, y1, x0) + _at(total, y0, x0)
    return area / ((x1 - x0) * (y1 - y0))


def _at(total: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Bilinear values of an integral image."""
    row = np.clip(np.floor(y).astype(int), 0, total.shape[0] - 2)
    col = np.clip(np.floor(x).astype(int), 0, total.shape[1] - 2)
    down, right = y - row, x - col
    upper = total[row, col] * (1 - right) + total[row, col + 1] * right
    lower = total[row + 1, col] * (1 - right) + total[row + 1, col + 1] * right
    return upper * (1 - down) + lower * down
