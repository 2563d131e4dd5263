# SPDX-License-Identifier: Apache-2.0
"""Selection, gathering, greedy choice, scores, merging: ``dispatch`` is the single entry point to the fastest
implementation that is there.

``with vlmprune.kernels.use("reference"):`` forces one; every function takes ``backend=`` as well. Names are
loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "contextual_groups",
    "contextual_rows",
    "crop_scores",
    "crop_variance",
    "detrend",
    "gather_rows",
    "greedy_cover",
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
    "use",
    "zoo_sensitivity",
]

if TYPE_CHECKING:
    from .dispatch import (
        contextual_groups,
        contextual_rows,
        crop_scores,
        crop_variance,
        detrend,
        gather_rows,
        greedy_cover,
        greedy_dpp,
        greedy_dpp_features,
        greedy_maxmin,
        greedy_maxmin_features,
        host_slots,
        ordered_indices,
        prune,
        share_out,
        stretch,
        top_k_in_groups,
        topk_select,
        unprune,
        use,
        zoo_sensitivity,
    )


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(".dispatch", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
