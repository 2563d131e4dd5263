# SPDX-License-Identifier: Apache-2.0
"""VisPruner: scores, both halves in their order, and kept sets."""

from __future__ import annotations

from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.methods.vispruner import VisPruner


def selection(case):
    hyper = case.hyper
    method = VisPruner(important=hyper["important_ratio"], step=hyper["prune_step"])
    tokens = VisualTokens(
        cls_attention=case.tensor("cls_attentions"), encoder_features=case.tensor("image_features")
    )
    important, diverse = method.halves(tokens, hyper["visual_token_num"])
    case.check("scores", method.attention(tokens))
    case.check("important_indices", important)
    case.check("diverse_indices", diverse)
    case.check("kept_indices", choose(method, tokens, hyper["visual_token_num"]))


RUNNERS = {"selection": selection, "selection_odd": selection}
