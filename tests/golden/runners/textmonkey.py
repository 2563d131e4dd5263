# SPDX-License-Identifier: Apache-2.0
"""TextMonkey: largest cosines and kept sets of the filter.

The trained block that follows it in the paper is no part of the package. It is written out here, so that
vectors of both together hold what the filter hands on.
"""

from __future__ import annotations

import torch
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.methods.textmonkey import TextMonkey


def keep(case):
    method, tokens = TextMonkey(case.hyper["compare"]), VisualTokens(features=case.tensor("features"))
    kept = choose(method, tokens, case.hyper["keep"])
    case.check("kept_indices", kept)
    return -method.score(tokens), kept


def filtered(case):
    case.check("similarity", keep(case)[0])


def resampled(case):
    x, (_, kept), heads = case.tensor("features"), keep(case), case.hyper["heads"]
    rows = torch.stack([one[index] for one, index in zip(x, kept, strict=True)])  # (B, r, C)

    def weight(name):
        return case.tensor(f"param/{name}")

    def normed(y, name):
        scale, shift = weight(f"{name}.weight"), weight(f"{name}.bias")
        return layer_norm(y, scale.shape, scale, shift, case.hyper["norm_eps"])

    def split(y):
        return y.unflatten(-1, (heads, -1)).transpose(1, 2)

    down = [linear(y, weight("down.weight")) for y in (x, rows)]
    every, own = normed(down[0], "norm_tokens"), normed(down[1], "norm_kept")
    keys, values = linear(torch.cat([every, own], dim=1), weight("key_value.weight")).chunk(2, dim=-1)
    looked = scaled_dot_product_attention(*map(split, (linear(own, weight("query.weight")), keys, values)))
    inner = normed(linear(looked.transpose(1, 2).flatten(2), weight("out.weight")), "mlp_norm")
    added = linear(gelu(linear(inner, weight("mlp_in.weight"))), weight("mlp_out.weight"))
    case.check("output", rows + weight("scale") * added)


RUNNERS = {"filter": filtered, "resampler": resampled}
