# SPDX-License-Identifier: Apache-2.0
"""SCOPE: order of picking, what picks were worth, and kept sets."""

from __future__ import annotations

from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.methods.pairs import patch_rows
from vlmprune.methods.scope import SCOPE, cover_salient

COMBINE = {"multi": "product", "add": "sum"}


def selection(case):
    k, combine = case.hyper["visual_token_num"], COMBINE[case.hyper["combine"]]
    method = SCOPE(alpha=case.hyper["alpha"], combine=combine)
    tokens = VisualTokens(
        encoder_features=case.tensor("image_features"), cls_attention=case.tensor("cls_attentions")
    )
    order, worth = cover_salient(patch_rows(tokens), method.saliency(tokens) ** method.alpha, k, combine)
    case.check("pick_order", order)
    case.check("pick_score", worth)
    case.check("kept_indices", choose(method, tokens, k))


RUNNERS = {"selection": selection}
