# SPDX-License-Identifier: Apache-2.0
"""HiPrune: received attention of two blocks, anchors and kept sets, from scores, maps or pixels."""

from __future__ import annotations

import json

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.hooks.vision.capture import VisionCapture
from vlmprune.methods.hiprune import HiPrune


def method_of(case, variant="grid"):
    layer = case.hyper.get("select_layer", -2)
    middle = case.hyper["object_layer"]
    return HiPrune(alpha=case.hyper["alpha"], object_layer=middle, variant=variant, layer=layer)


def check_kept(case, middle, deep):
    grids, k = (tuple(case.hyper["grid"]),), case.hyper["visual_token_num"]
    for name, variant in (("kept_indices", "official"), ("kept_indices_true_neighbours", "grid")):
        method = method_of(case, variant)
        of_layers = dict(zip(method.needs, (deep, middle), strict=True))
        tokens = VisualTokens(received_attention=deep, of_layers=of_layers, grids=grids)
        case.check(name, choose(method, tokens, k))
        if "anchor_indices" in case.arrays:
            case.check("anchor_indices", method.anchors(tokens, k))


def selection(case):
    case.checked |= {"object_attention", "deep_attention"}  # given, not made
    check_kept(case, case.tensor("object_attention"), case.tensor("deep_attention"))


def maps(case):
    received = {}
    for name in ("object", "deep"):
        received[name] = case.tensor(f"{name}_map").mean(dim=(1, 2))[:, 1:]  # heads and all queries
        case.check(f"{name}_attention", received[name])
    check_kept(case, received["object"], received["deep"])


def end_to_end(case):
    config = CLIPVisionConfig(**json.loads(str(case.arrays["config_json"])), attn_implementation="sdpa")
    tower, method = case.load(CLIPVisionModel(config)), method_of(case)
    by_share = HiPrune(alpha=case.hyper["alpha"])  # 3/8 of 24 blocks is the same one
    for one in (method, by_share):
        layers = (case.hyper["select_layer"],)
        with torch.no_grad(), VisionCapture(tower, needs=one.needs, layers=layers) as record:
            tower(case.tensor("pixel_values"))
        deep, middle = (record.take()[need] for need in one.needs)
        case.check("object_attention", middle)
        case.check("deep_attention", deep)
    check_kept(case, middle, deep)


RUNNERS = {"selection": selection, "maps": maps, "end_to_end": end_to_end}
