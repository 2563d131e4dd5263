# SPDX-License-Identifier: Apache-2.0
"""VisionSelector: scores and kept sets of given tokens and weights, read from the files of a training."""

from __future__ import annotations

import tempfile

from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.core.weights import write_weights
from vlmprune.methods.visionselector import VisionSelector


def selection(case):
    features = case.tensor("features")
    names = ("q_weight", "q_bias", "k_weight", "k_bias")
    weights = {name.replace("_", "_proj."): case.tensor(name) for name in names}
    assert weights["q_proj.weight"].shape[0] == case.hyper["hidden"]
    with tempfile.TemporaryDirectory() as folder:
        write_weights(folder, "visionselector", weights, {"backbone": {"hidden_size": features.shape[2]}})
        method = VisionSelector(folder)
    tokens = VisualTokens(features=features)
    case.check("scores", method.score(tokens))
    case.check("kept_indices", choose(method, tokens, case.hyper["keep"]))


RUNNERS = {"selection": selection}
