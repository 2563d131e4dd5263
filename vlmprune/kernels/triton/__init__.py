# SPDX-License-Identifier: Apache-2.0
"""All launchers of Triton kernels. Importing this needs Triton; nothing else of the package does.

Their input was validated by ``dispatch``. Answers are contiguous; indices are int32, values float32.
"""

from __future__ import annotations

from .dpp import greedy_dpp, greedy_dpp_features
from .gather import gather_rows, unprune
from .maxmin import greedy_maxmin, greedy_maxmin_features
from .prune import prune
from .select import topk_select
from .sensitivity import zoo_sensitivity

__all__ = [
    "gather_rows",
    "greedy_dpp",
    "greedy_dpp_features",
    "greedy_maxmin",
    "greedy_maxmin_features",
    "prune",
    "topk_select",
    "unprune",
    "zoo_sensitivity",
]
