# SPDX-License-Identifier: Apache-2.0
"""HoloV, official code: crop scores, quotas, order of output with its zero rows, and kept sets."""

from __future__ import annotations

from vlmprune.core.select import choose, top_k_in_groups
from vlmprune.core.tokens import VisualTokens
from vlmprune.kernels.crops import EPS, in_crops, official_quota, sizes_of
from vlmprune.methods.holov import ATTENTION_SCALE, HoloV, official_scores
from vlmprune.methods.holov.crops import bands


def selection(case):
    attention, hyper = case.tensor("attention"), case.hyper
    n, crops, k = attention.shape[1], hyper["num_crops"], hyper["budget"]
    assert (hyper["attention_scale"], hyper["eps"]) == (ATTENTION_SCALE, EPS)
    members = bands(n, crops)
    held, sizes = in_crops(attention, members), sizes_of(members)
    scores = official_scores(held.sum(-1) / sizes, members, hyper["alpha"])
    quota = official_quota(scores ** hyper["tau"], k)
    positions = top_k_in_groups(held, members, quota, k)
    ascending = positions.where(positions >= 0, n).sort(1).values
    case.check("crop_sizes", sizes)
    case.check("crop_scores", scores)
    case.check("allocated", quota)
    case.check("positions_official_order", positions)
    case.check("kept_indices", ascending.where(ascending < n, -1))
    case.check("n_kept", (positions >= 0).sum(1))
    # the method keeps the same tokens, and others where there would be zero rows
    method = HoloV(crops=crops, alpha=hyper["alpha"], tau=float(hyper["tau"]), variant="official")
    keep = choose(method, VisualTokens(cls_attention=attention), k)
    for row, expected in zip(keep.tolist(), positions.tolist(), strict=True):
        assert set(expected) - {-1} <= set(row)


RUNNERS = {"selection": selection}
