# SPDX-License-Identifier: Apache-2.0
"""MMTok: order of picking, gains and kept sets; padding is given as a list of patches."""

from __future__ import annotations

import torch

from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.methods.mmtok import MMTok


class Given(MMTok):
    """Takes what may not be chosen from the vectors, in place of the size of a picture."""

    def excluded(self, tokens):
        return self.__dict__["given"]


def selection(case):
    hyper, features = case.hyper, case.tensor("features")
    names = ("alpha", "text_temperature", "vision_temperature")
    method = Given(**{name: hyper[name] for name in names})
    given = None
    if "excluded" in case.arrays:
        given = torch.zeros(features.shape[1], dtype=torch.bool)
        given[case.tensor("excluded")] = True
    method.__dict__["given"] = given
    tokens = VisualTokens(
        features=features,
        encoder_features=case.tensor("encoder_features"),
        text_embeds=case.tensor("text_embeds").expand(features.shape[0], -1, -1),
    )
    order, gain = method.walk(method.cover(tokens), hyper["keep"], given)
    case.check("pick_order", order)
    case.check("pick_gain", gain)
    case.check("kept_indices", choose(method, tokens, hyper["keep"]))


RUNNERS = {"selection": selection}
