# SPDX-License-Identifier: Apache-2.0
"""G-Prune: scores and kept sets of dense, sparse and tight graphs."""

from __future__ import annotations

from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.methods.gprune import GPrune


def selection(case):
    hyper = case.hyper
    method = GPrune(hyper["similarity"], hyper["temperature"], hyper["iterations"])
    tokens = VisualTokens(features=case.tensor("features"))
    case.check("scores", method.score(tokens))
    case.check("kept_indices", choose(method, tokens, hyper["keep"]))


RUNNERS = {"selection": selection}
