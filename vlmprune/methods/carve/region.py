# SPDX-License-Identifier: Apache-2.0
"""CARVE's region: from attention to the patches under a question and under a general instruction to the part
of the picture that the question asks about.

Letters: T steps of an answer, layers, N patches of one grid (rows, cols), a picture of W x H pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import InvariantError

Steps = Literal["all", "first", "last"]
Strategy = Literal["attention_sum", "size", "drop_small"]
Box = tuple[int, int, int, int]  # left, top, right, bottom; the last two are not part of it
_SMALL = 0.001  # of the kept area: regions below it are dropped by "drop_small"


def contrast(question: Tensor, general: Tensor, lam: float, steps: Steps = "all") -> Tensor:
    """(N,) float64 sum of w_t A_Q / (A_G + lam) over the steps and layers that both answers have.

    Args:
        question: (T, layers, N) attention of the last row to the patches, mean over heads.
        general: (T', layers, N) the same under the general instruction.
        steps: "all" with the weights t + 1, or the "first" or "last" one alone.
    """
    if question.shape[1:] != general.shape[1:]:
        raise InvariantError(
            f"attention of {tuple(question.shape)} and {tuple(general.shape)}; expected the same layers and "
            "patches"
        )
    count = min(len(question), len(general))  # the longer answer is cut
    used = {"all": slice(0, count), "first": slice(0, 1), "last": slice(count - 1, count)}[steps]
    # 1, 2, 3, ... for steps 0, 1, 2, ...; one step alone has the weight 1
    weight = torch.arange(1, count + 1, dtype=torch.float64)[used] if steps == "all" else torch.ones(1)
    parts = question[:count][used].double() / (general[:count][used].double() + lam)  # (T, layers, N)
    return (parts.sum(dim=1) * weight[:, None].to(parts.device)).sum(dim=0)


def enlarged(values: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """(H, W) the values (N,) of a grid enlarged to a picture of ``size`` (W, H), by bilinear interpolation
    between the centres of patches.
    """
    width, height = size
    return torch.nn.functional.interpolate(
        values.double().view(1, 1, *grid), size=(height, width), mode="bilinear", align_corners=False
    )[0, 0]


@dataclass(frozen=True, eq=False)
class Regions:
    """Connected regions of a map.

    Args:
        labels: (H, W) number of the region of each pixel, from 1 in reading order; 0 for none.
        sums, sizes: per region, of the map and of its pixels.
    """

    labels: NDArray[np.int64]
    sums: NDArray[np.float64]
    sizes: NDArray[np.int64]


def connected(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(H, W) labels of the regions of a mask whose pixels touch at a side."""
    # union-find: the label that each label was joined to; 0 is no region and stays alone
    parent: list[int] = [0]

    def root(label: int) -> int:
        while parent[label] != label:
            parent[label] = parent[parent[label]]  # halves the way for the next search
            label = parent[label]
        return label

    labels = np.zeros(mask.shape, dtype=np.int64)
    # runs of neighbouring pixels, row by row: a run takes the lowest label that touches it from above
    for row, line in enumerate(mask):
        # begins and ends of runs, in turn: True, True, False gives 0, 2
        edges = np.flatnonzero(np.diff(np.concatenate([[False], line, [False]]).astype(np.int8)))
        for start, end in edges.reshape(-1, 2):
            above = np.unique(labels[row - 1, start:end]) if row else np.zeros(0, dtype=np.int64)
            roots = sorted({root(int(label)) for label in above if label})
            if not roots:
                roots = [len(parent)]
                parent.append(roots[0])
            for other in roots[1:]:
                parent[other] = roots[0]
            labels[row, start:end] = roots[0]
    # joined labels become one
    found = np.array([root(label) for label in range(len(parent))])[labels]
    # numbered without gaps; where no pixel is outside, the lowest label is a region and becomes 1
    known = np.unique(found)
    return np.searchsorted(known, found) if known[0] == 0 else np.searchsorted(known, found) + 1


def regions_of(values: NDArray[np.float64], mask: NDArray[np.bool_]) -> Regions:
    """The regions of a mask, with what the map (H, W) has in them."""
    labels = connected(mask)
    count = int(labels.max())
    sums: NDArray[np.float64] = np.bincount(
        labels.ravel(), weights=values.ravel(), minlength=count + 1
    ).astype(np.float64)
    # label 0, no region, is left out
    return Regions(labels, sums[1:], np.bincount(labels.ravel(), minlength=count + 1)[1:])


def kept_mask(
    values: Tensor, top_share: float = 0.2, min_regions: int = 3, strategy: Strategy = "attention_sum"
) -> NDArray[np.bool_]:
    """(H, W) the pixels of the best regions among the highest share of a map (H, W)."""
    made = values.cpu().double().numpy()
    # values equal to the threshold all stay, so this may be more than the share
    high = made >= np.quantile(made, 1 - top_share)
    found = regions_of(made, high)
    if strategy == "drop_small":
        chosen = np.flatnonzero(found.sizes >= _SMALL * high.sum())
    else:
        rank = found.sums if strategy == "attention_sum" else found.sizes
        count = max(min_regions, int(top_share * len(rank)))
        chosen = np.argsort(-rank, kind="stable")[:count]  # of equals, the first in reading order
    kept: NDArray[np.bool_] = np.isin(found.labels, chosen + 1)  # labels begin at 1, indices at 0
    return kept


def box_of(mask: NDArray[np.bool_]) -> Box:
    """The bounding box of a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def refined_size(box: Box, size: tuple[int, int], official: bool = False) -> tuple[int, int]:
    """(width, height) of a crop, enlarged until it covers the picture of ``size`` (W, H) on one side, with at
    most its area.

    Args:
        official: cover both sides, whatever the area: 10 x 300 of 300 x 300 becomes 300 x 9000.
    """
    width, height = box[2] - box[0], box[3] - box[1]
    scale = max(size[0] / width, size[1] / height)
    if not official:
        scale = min(scale, (size[0] * size[1] / (width * height)) ** 0.5)
    return max(1, int(width * scale)), max(1, int(height * scale))
