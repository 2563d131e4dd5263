# SPDX-License-Identifier: Apache-2.0
"""VScan: the first stage from given attention, in the official count and in ours, and from pixels; the
projector is the identity. The second stage is a cut by attention rows, see fastv and pyramiddrop.
"""

from __future__ import annotations

import json

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from vlmprune.core.method import Need
from vlmprune.core.select import best_first, choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.hooks.vision.capture import VisionCapture
from vlmprune.methods.vscan import VScan, joining, local_set, official_keep, per_window, windows


def scan_and_merge(case):
    """The official count is our rule at the number of tokens that it really keeps."""
    members = windows((tuple(case.hyper["grid"]),), case.hyper["window"])
    check_stage(case, given_tokens(case), official_keep(case.hyper["visual_token_num"], len(members)))


def exact_budget(case):
    check_stage(case, given_tokens(case), case.hyper["visual_token_num"])


def end_to_end(case):
    layer = case.hyper["select_layer"]
    config = CLIPVisionConfig(**json.loads(str(case.arrays["config_json"])), attn_implementation="sdpa")
    tower = case.load(CLIPVisionModel(config))
    method = method_of(case)
    with torch.no_grad(), VisionCapture(tower, method.needs, layers=(layer,)) as record:
        hidden = tower(case.tensor("pixel_values"), output_hidden_states=True).hidden_states[layer]
    deep, shallow = (record.take()[need] for need in method.needs[:2])
    keep = official_keep(
        case.hyper["visual_token_num"], len(windows((tuple(case.hyper["grid"]),), method.window))
    )
    check_stage(case, tokens_of(case, hidden[:, 1:], shallow, deep), keep)


def given_tokens(case):
    shallow, deep = case.tensor("shallow_cls_attention"), case.tensor("deep_cls_attention")
    return tokens_of(case, case.tensor("features"), shallow, deep)


def tokens_of(case, features, shallow, deep):
    return VisualTokens(
        features=features,
        cls_attention=deep,
        of_layers={Need("cls_attention", VScan.shallow): shallow},
        grids=(tuple(case.hyper["grid"]),),
    )


def method_of(case):
    return VScan(window=case.hyper["window"], local=1 - case.hyper["global_ratio"])


def check_stage(case, tokens, keep):
    method = method_of(case)
    if "kept" in case.hyper:
        assert keep == case.hyper["kept"]
    merged = choose(method, tokens, keep)
    case.check("kept_indices", merged.slots)
    case.check("output_tokens", merged.features)
    members = windows(tokens.grids, method.window)
    w = per_window(keep, members, method.local)
    taken = local_set(method.attention(tokens, method.shallow), members, w)
    case.check("local_indices", taken.sort(dim=1).values)
    if "global_indices" in case.arrays:
        deep = method.attention(tokens, None).scatter(1, taken, -torch.inf)
        case.check("global_indices", best_first(deep, keep - taken.shape[1]))
    if "merge_target" in case.arrays:
        _, target = joining(tokens.features, merged.slots)
        case.check("merge_target", target)
        case.check("merge_count", torch.nn.functional.one_hot(target, keep).sum(dim=1))


RUNNERS = {"scan_and_merge": scan_and_merge, "exact_budget": exact_budget, "end_to_end": end_to_end}
