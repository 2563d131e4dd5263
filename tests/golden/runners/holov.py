# SPDX-License-Identifier: Apache-2.0
"""HoloV, official code: crop scores, quotas, order of output with its zero rows, and kept sets."""

from __future__ import annotations

from torch.nn.functional import pad

from vlmprune.core.select import choose, top_k_in_groups
from vlmprune.core.tokens import VisualTokens
from vlmprune.methods import holov


def selection(case):
    attention, hyper = case.tensor("attention"), case.hyper
    n, crops, k = attention.shape[1], hyper["num_crops"], hyper["budget"]
    assert (hyper["attention_scale"], hyper["eps"]) == (holov.ATTENTION_SCALE, holov.EPS)
    members = holov.bands(n, crops)
    held, sizes = pad(attention, (0, 1))[:, members], (members >= 0).sum(1)
    scores = holov.official_scores(held, sizes, hyper["alpha"])
    quota = holov.official_quota(scores ** hyper["tau"], k)
    positions = top_k_in_groups(held, members, quota, k)
    ascending = positions.where(positions >= 0, n).sort(1).values
    case.check("crop_sizes", sizes)
    case.check("crop_scores", scores)
    case.check("allocated", quota)
    case.check("positions_official_order", positions)
    case.check("kept_indices", ascending.where(ascending < n, -1))
    case.check("n_kept", (positions >= 0).sum(1))
    # the method keeps the same tokens, and others where there would be zero rows
    method = holov.HoloV(crops=crops, alpha=hyper["alpha"], tau=float(hyper["tau"]), variant="official")
    keep = choose(method, VisualTokens(cls_attention=attention), k)
    for row, expected in zip(keep.tolist(), positions.tolist(), strict=True):
        assert set(expected) - {-1} <= set(row)


RUNNERS = {"selection": selection}
