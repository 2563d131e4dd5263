# SPDX-License-Identifier: Apache-2.0
"""All launchers of Triton kernels. Importing this needs Triton; nothing else of the package does.

Their input was validated by ``dispatch``. Answers are contiguous; indices are int32, values float32.
"""

from __future__ import annotations

from .contextual import contextual_groups, contextual_rows
from .crops import crop_scores, crop_variance, share_out, top_k_in_groups
from .dpp import greedy_dpp, greedy_dpp_features
from .gather import gather_rows, unprune
from .indices import host_slots, ordered_indices
from .maxmin import greedy_maxmin, greedy_maxmin_features
from .prune import prune
from .scores import detrend, stretch
from .select import topk_select
from .sensitivity import zoo_sensitivity

__all__ = [
    "contextual_groups",
    "contextual_rows",
    "crop_scores",
    "crop_variance",
    "detrend",
    "gather_rows",
    "greedy_dpp",
    "greedy_dpp_features",
    "greedy_maxmin",
    "greedy_maxmin_features",
    "host_slots",
    "ordered_indices",
    "prune",
    "share_out",
    "stretch",
    "top_k_in_groups",
    "topk_select",
    "unprune",
    "zoo_sensitivity",
]
