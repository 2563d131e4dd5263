# SPDX-License-Identifier: Apache-2.0
"""PruMerge: attention, centres, neighbours and rows, by its own count or at a budget; the projector is the
identity.
"""

from __future__ import annotations

import json

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from vlmprune.core.select import choose, choose_own
from vlmprune.core.tokens import VisualTokens
from vlmprune.hooks.vision.capture import VisionCapture, row_attention
from vlmprune.methods.prumerge import PruMerge, nearest


def tokens_of(features, attention, keys):
    """Tokens whose projector is the identity; ``keys`` are without that of [CLS]."""
    return VisualTokens(
        features=features,
        encoder_features=features,
        wide_attention=attention,
        wide_keys=keys,
        projector=lambda x: x,
    )


def given(case):
    query, keys = case.tensor("cls_query"), case.tensor("keys")
    attention = row_attention(query, keys, 1, query.shape[1] ** -0.5)[:, 0, 1:]
    case.check("cls_attention", attention)
    return tokens_of(case.tensor("features"), attention, keys[:, 1:])


def check(case, method, tokens, rows, slots):
    """Rows and centres (B, k, ...), of which the last row is no centre."""
    case.check("centre_indices", slots[:, :-1])
    assert (slots[:, -1] == -1).all()
    if "neighbour_indices" in case.arrays:
        near = nearest(tokens.wide_keys, slots[:, :-1], method.neighbours)
        case.check("neighbour_indices", near)
    if "kept_count" in case.arrays:
        case.check("kept_count", torch.full(case.arrays["kept_count"].shape, rows.shape[1]))
    case.check("output_tokens", rows)


def budget(case, tokens, plus, keep):
    method = PruMerge(plus=plus, neighbours=case.hyper["neighbours"], order="official")
    merged = choose(method, tokens, keep)
    check(case, method, tokens, merged.features, merged.slots)


def official(case, plus):
    tokens, hyper = given(case), case.hyper
    if not hyper["adaptive"]:
        assert not plus, "the official fixed branch of PruMerge+ is not offered"
        return budget(case, tokens, plus, int(tokens.count * hyper["reduction_ratio"]) + 1)
    method = PruMerge(plus, hyper["neighbours"], hyper["iqr_factor"], order="official", variant="official")
    units = choose_own(method, tokens)
    rows, slots = (torch.stack([getattr(one, name) for one in units]) for name in ("features", "slots"))
    return check(case, method, tokens, rows, slots)


def end_to_end(case):
    hyper = case.hyper
    config = CLIPVisionConfig(**json.loads(str(case.arrays["config_json"])), attn_implementation="sdpa")
    tower, layer = case.load(CLIPVisionModel(config)), hyper["select_layer"]
    needs = PruMerge().needs[:2]
    with torch.no_grad(), VisionCapture(tower, needs=needs, layers=(layer,)) as record:
        states = tower(case.tensor("pixel_values"), output_hidden_states=True).hidden_states
    attention, keys = (record.take()[need] for need in needs)
    case.check("cls_attention", attention)
    tokens = tokens_of(states[layer][:, 1:], attention, keys)
    budget(case, tokens, False, int(tokens.count * hyper["reduction_ratio"]) + 1)


RUNNERS = {
    "prumerge": lambda case: official(case, plus=False),
    "prumerge_plus": lambda case: official(case, plus=True),
    "prumerge_budget": lambda case: budget(case, given(case), False, case.hyper["keep"]),
    "prumerge_plus_budget": lambda case: budget(case, given(case), True, case.hyper["keep"]),
    "end_to_end": end_to_end,
}
