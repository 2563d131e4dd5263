# SPDX-License-Identifier: Apache-2.0
"""DivPrune: order of picking, distances and kept sets."""

from __future__ import annotations

from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.methods.divprune import DivPrune, greedy_maxmin


def selection(case):
    features = case.tensor("visual_tokens").flatten(0, -2)[None]  # (1, N, D); frames form one set
    budget = round(case.hyper["subset_ratio"] * features.shape[1])  # the published rule, half to even
    assert budget == case.hyper["budget"]
    order, distance = greedy_maxmin(features, budget)
    case.check("selection_order", order[0])
    case.check("min_distance_at_pick", distance[0])
    case.check("kept_indices", choose(DivPrune(), VisualTokens(features=features), budget)[0])


RUNNERS = {"selection": selection}
