# SPDX-License-Identifier: Apache-2.0
"""TextMonkey: largest cosines and kept sets of the filter, and rows of the trained block behind it."""

from __future__ import annotations

import tempfile

from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.core.weights import write_weights
from vlmprune.methods.textmonkey import TextMonkey


def filtered(case):
    method, tokens = TextMonkey(case.hyper["compare"]), VisualTokens(features=case.tensor("features"))
    kept = choose(method, tokens, case.hyper["keep"])
    case.check("kept_indices", kept)
    case.check("similarity", -method.score(tokens))


def resampled(case):
    features, hyper = case.tensor("features"), case.hyper
    assert hyper["norm_eps"] == 1e-5, "the default of the block"
    weights = {
        name.removeprefix("param/"): case.tensor(name) for name in case.arrays if name.startswith("param/")
    }
    facts = {"backbone": {"hidden_size": features.shape[2]}, "heads": hyper["heads"]}
    with tempfile.TemporaryDirectory() as folder:
        write_weights(folder, "textmonkey", weights, facts)
        method = TextMonkey(hyper["compare"], folder)
    merged = choose(method, VisualTokens(features=features), hyper["keep"])
    case.check("kept_indices", merged.slots)
    case.check("output", merged.features)


RUNNERS = {"filter": filtered, "resampler": resampled}
