# SPDX-License-Identifier: Apache-2.0
"""All launchers of Triton kernels. Importing this needs Triton; nothing else of the package does.

Their input was validated by ``dispatch``. Answers are contiguous; indices are int32, values float32.
"""

from __future__ import annotations

from .attention import attn_row_scores
from .dpp import greedy_dpp, greedy_dpp_features
from .gather import gather_rows, unprune
from .maxmin import greedy_maxmin, greedy_maxmin_features
from .prune import prune, prune_varlen
from .select import topk_select, topk_select_varlen
from .sensitivity import zoo_sensitivity

__all__ = [
    "attn_row_scores",
    "gather_rows",
    "greedy_dpp",
    "greedy_dpp_features",
    "greedy_maxmin",
    "greedy_maxmin_features",
    "prune",
    "prune_varlen",
    "topk_select",
    "topk_select_varlen",
    "unprune",
    "zoo_sensitivity",
]
