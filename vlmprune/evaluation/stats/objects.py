# SPDX-License-Identifier: Apache-2.0
"""Where the object asked about lies among the patches: for diagnosis only, never for selection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ...core.keepmap import KeepMap, ScoreMap
from ...errors import EvaluationError

COVERED = 0.1  # share of a patch that the object must cover for the patch to count as lying on it


class Asked:
    """The objects that one sample asks about, as masks (H, W); patches are found once for all specs."""

    def __init__(self, name: str, masks: Sequence[Any], images: int) -> None:
        self._masks = [np.asarray(mask, dtype=bool) for mask in masks]
        if len(self._masks) != images:
            given = f"{len(self._masks)} object masks for {images} images"
            raise EvaluationError(
                f"{name}: {given}; expected one for each, empty where nothing is asked about"
            )
        self._patches: dict[tuple, np.ndarray] = {}  # (image, grids, view) -> (N,) bool

    def share(self, maps: Sequence[KeepMap]) -> float | None:
        """Share of the kept tokens that lie on the objects; None where nothing is asked about, or kept."""
        kept = sum(map(len, maps))
        # an empty mask: nothing is asked about
        if not kept or not any(mask.any() for mask in self._masks):
            return None
        return sum(int(self.patches(image, one)[one.keep_idx].sum()) for image, one in enumerate(maps)) / kept

    def patches(self, image: int, where: KeepMap | ScoreMap) -> np.ndarray:
        """(N,) bool, patches of one image that the objects cover enough."""
        key = (image, where.grids, where.view)
        if key not in self._patches:
            self._patches[key] = covered_share(self._masks[image], where.boxes, where.view) >= COVERED
        return self._patches[key]


def covered_share(mask: np.ndarray, boxes: Tensor, view: str) -> np.ndarray:
    """(N,) share of every box that is covered by the mask (height, width); boxes in [0, 1] of the view."""
    if mask.ndim != 2:
        raise EvaluationError(f"an object mask has shape {mask.shape}; expected (height, width)")
    # the processor cuts off what lies outside of the largest centred square
    if view == "center":
        side = min(mask.shape)
        top, left = ((length - side) // 2 for length in mask.shape)
        mask = mask[top : top + side, left : left + side]
    # sums over whole pixels up to each corner, interpolated between corners: exact areas of boxes that cut
    # through pixels
    total = np.pad(mask.cumsum(0).cumsum(1), ((1, 0), (1, 0))).astype(float)
    x0, y0, x1, y1 = (boxes.double().numpy() * np.tile([mask.shape[1], mask.shape[0]], 2)).T  # (N,) pixels
    area = _at(total, y1, x1) - _at(total, y0, x1) - _at(total, y1, x0) + _at(total, y0, x0)
    return area / ((x1 - x0) * (y1 - y0))


def _at(total: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Bilinear values of an integral image."""
    # the far edge belongs to the last pixel, so that row + 1 exists
    row = np.clip(np.floor(y).astype(int), 0, total.shape[0] - 2)
    col = np.clip(np.floor(x).astype(int), 0, total.shape[1] - 2)
    down, right = y - row, x - col
    upper = total[row, col] * (1 - right) + total[row, col + 1] * right
    lower = total[row + 1, col] * (1 - right) + total[row + 1, col + 1] * right
    return upper * (1 - down) + lower * down
