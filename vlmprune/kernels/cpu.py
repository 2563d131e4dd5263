# SPDX-License-Identifier: Apache-2.0
"""The kernels for the CPU: the choices that measured best on one thread, each exactly what ``reference``
says.

NumPy takes the small steps, because a call of it costs a fraction of a call of torch. Greedy choices: see
``cpu_greedy``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import reference
from .cpu_greedy import greedy_cover, greedy_dpp, greedy_dpp_features, greedy_maxmin, greedy_maxmin_features
from .eager import gather_rows, unprune, zoo_sensitivity
from .reference import (
    contextual_groups,
    contextual_rows,
    crop_scores,
    crop_variance,
    detrend,
    host_slots,
    ordered_indices,
    share_out,
    stretch,
    top_k_in_groups,
)


def topk_select(scores: Tensor, k: int) -> Tensor:
    # numpy() refuses tensors that ask for gradients
    scores = scores.detach().float()
    batch, n = scores.shape
    if k >= n:
        return torch.arange(n, dtype=torch.int32).expand(batch, n).contiguous()
    # no values have no minimum
    if k == 0:
        return torch.empty(batch, 0, dtype=torch.int32)
    idx, rows = np.empty((batch, k), np.int32), scores.numpy()
    # the k-th largest value, found without sorting; NaN where the row holds one, which NumPy ranks highest
    limits = np.partition(rows, n - k, axis=1)[:, n - k :].min(axis=1)
    for b in range(batch):
        limit = limits[b]
        idx[b] = (
            _at_least(rows[b], limit, k)
            # NaN differs from itself
            if limit == limit
            else reference.topk_select(scores[b : b + 1], k)[0].numpy()
        )
    return torch.from_numpy(idx)


def _at_least(row: np.ndarray, limit: np.float32, k: int) -> np.ndarray:
    """The k indices of values above the limit, or equal to it from the left."""
    (found,) = (row >= limit).nonzero()
    # no ties at the limit, which is the usual case
    if len(found) == k:
        return found
    keep = row > limit
    keep[np.flatnonzero(row == limit)[: k - np.count_nonzero(keep)]] = True
    return np.flatnonzero(keep)


def prune(scores: Tensor, k: int, xs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    idx = topk_select(scores, k)
    return idx, gather_rows(xs, idx)
