# SPDX-License-Identifier: Apache-2.0
"""All launchers of Triton kernels. Importing this needs Triton; nothing else of the package does."""

from __future__ import annotations

from .triton_attention import attn_row_scores, zoo_sensitivity
from .triton_choice import greedy_dpp, greedy_dpp_features, greedy_maxmin, greedy_maxmin_features
from .triton_rows import gather_rows, prune, prune_varlen, unprune
from .triton_topk import topk_select, topk_select_varlen
