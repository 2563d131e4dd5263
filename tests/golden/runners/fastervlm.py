# SPDX-License-Identifier: Apache-2.0
"""FasterVLM: scores and kept sets, from attention or from pixels, and the order of tiles."""

from __future__ import annotations

import json

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from vlmprune.core.method import Need
from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.hooks.vision.capture import VisionCapture
from vlmprune.hooks.vision.tiles import pack_tiles
from vlmprune.methods.fastervlm import FasterVLM


def selection(case):
    tokens = VisualTokens(cls_attention=case.tensor("cls_attentions"))
    case.check("scores", FasterVLM().score(tokens))
    case.check("kept_indices", choose(FasterVLM(), tokens, case.hyper["visual_token_num"]))


def end_to_end(case):
    layer = case.hyper.get("select_layer", -2)
    config = CLIPVisionConfig(**json.loads(str(case.arrays["config_json"])), attn_implementation="sdpa")
    tower = case.load(CLIPVisionModel(config))
    with torch.no_grad(), VisionCapture(tower, needs=("cls_attention",), layers=(layer,)) as record:
        hidden = tower(case.tensor("pixel_values"), output_hidden_states=True).hidden_states[layer]
    attention = record.take()[Need("cls_attention")]
    case.check("cls_attentions", attention)
    case.check("hidden_state_m2", hidden[:, 1:])
    tokens = VisualTokens(cls_attention=attention)
    case.check("scores", FasterVLM().score(tokens))
    for name in case.arrays:
        if name.startswith("kept_indices"):  # one array per budget
            case.check(name, choose(FasterVLM(), tokens, case.arrays[name].shape[1]))


def anyres_packing(case):
    features, k = case.tensor("tile_features"), case.hyper["visual_token_num_per_tile"]
    tokens = VisualTokens(features=features, cls_attention=case.tensor("tile_cls_attentions"))
    keep = choose(FasterVLM(anyres="spatial"), tokens, k)  # (T, K)
    order = pack_tiles(keep, tuple(case.arrays["tile_grid"].tolist()), case.hyper["tile_side"])
    tile, patch = order // k, keep.flatten()[order]
    case.check("kept_indices_per_tile", keep)
    case.check("expected_tile", tile)
    case.check("expected_patch", patch)
    ids, table = case.tensor("input_ids")[0], case.tensor("embed_table")
    at = int((ids == -200).nonzero())  # the image
    case.check("expected_embeds", torch.cat([table[ids[:at]], features[tile, patch], table[ids[at + 1 :]]]))


RUNNERS = {"selection": selection, "end_to_end": end_to_end, "anyres_packing": anyres_packing}
