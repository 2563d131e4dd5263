# SPDX-License-Identifier: Apache-2.0
"""IDPruner: order of picking and kept sets from given scores, through the wrapper."""

from __future__ import annotations

from vlmprune.core.method import Method
from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.methods.mmr import MMR, marginal_relevance, minmax


class Given(Method):
    """Scores that were recorded."""

    def score(self, tokens):
        return self.__dict__["scores"]


def selection(case):
    scores, features, hyper = case.tensor("scores"), case.tensor("features"), case.hyper
    k, balance, parallel = hyper["keep"], hyper["mmr_lambda"], hyper["parallel_k"]
    case.check("pick_order", marginal_relevance(minmax(scores.float()), features, k, balance, parallel))
    inner = Given()
    inner.__dict__["scores"] = scores
    method = MMR(inner, balance=balance, parallel=parallel)
    case.check("kept_indices", choose(method, VisualTokens(features=features), k))


RUNNERS = {"selection": selection}
