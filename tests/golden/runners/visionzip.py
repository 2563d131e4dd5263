# SPDX-License-Identifier: Apache-2.0
"""VisionZip: groups and merged rows, from tensors or from pixels, and the order of tiles. The projector is
the identity.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.hooks.vision.capture import VisionCapture
from vlmprune.hooks.vision.tiles import pack_tiles
from vlmprune.methods.visionzip import VisionZip, group


def selection_and_merge(case):
    hidden, keys = case.tensor("hidden_states"), case.tensor("metric")[:, 1:]
    check_rows(case, hidden, case.tensor("cls_attentions"), keys, hidden[:, :1])


def end_to_end(case):
    layer = case.hyper.get("select_layer", -2)
    config = CLIPVisionConfig(**json.loads(str(case.arrays["config_json"])), attn_implementation="sdpa")
    tower = case.load(CLIPVisionModel(config))
    with (
        torch.no_grad(),
        VisionCapture(tower, needs=("cls_attention", "keys", "cls_features"), layers=(layer,)) as record,
    ):
        hidden = tower(case.tensor("pixel_values"), output_hidden_states=True).hidden_states[layer]
    found = {need.what: value for need, value in record.take().items()}
    torch.testing.assert_close(hidden, case.tensor("hidden_states"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["cls_attention"], case.tensor("cls_attentions"), rtol=1e-4, atol=1e-6)
    case.check(
        "metric", found["keys"], at=np.s_[:, 1:]
    )  # the key of [CLS] takes part in nothing and is not captured
    check_rows(case, hidden, found["cls_attention"], found["keys"], found["cls_features"])


def check_rows(case, hidden, attention, keys, cls_features):
    patches, contextual = hidden[:, 1:], case.hyper["contextual"]
    tokens = VisualTokens(
        features=patches,
        encoder_features=patches,
        cls_attention=attention,
        keys=keys,
        cls_features=cls_features,
        projector=lambda x: x,
    )
    method, k = VisionZip(contextual=contextual), case.hyper["dominant"] + contextual  # dominant counts [CLS]
    groups = group(method.score(tokens), keys, case.hyper["dominant"] - 1, contextual)
    case.check("dominant_indices", groups.dominant)
    case.check("context_target_indices", groups.targets)
    members, join = members_of(groups, case.hyper["dominant"] - 1)
    case.check("merge_assignment", join)
    optional = {
        "merged_indices": members,
        "merge_counts": torch.nn.functional.one_hot(join, contextual).sum(1),
        "kept_indices": torch.cat([groups.dominant, groups.targets], 1).sort(1).values,
    }
    for name in optional.keys() & case.arrays.keys():
        case.check(name, optional[name])
    merged = choose(method, tokens, k)
    case.check("output_tokens", merged.features)
    torch.testing.assert_close(
        merged.slots, torch.cat([torch.full((len(hidden), 1), -1), groups.dominant, groups.targets], 1)
    )


def members_of(groups, dominant):
    """(B, R-c) patches that join a target, in the order of the official code, and its number for each."""
    count, contextual = groups.row.shape[1], groups.targets.shape[1]
    step = max(1, (count - dominant) // contextual)
    found = []
    for row, slots in zip(groups.row.tolist(), groups.slots.tolist(), strict=True):
        rest = [i for i in range(count) if i not in slots[:dominant]]
        spaced = [i for at, i in enumerate(rest) if at < contextual * step and at % step]
        members = spaced + rest[contextual * step :]
        found.append([members, [row[i] - dominant for i in members]])
    return torch.tensor(found).unbind(1)


def anyres_packing(case):
    tokens, dominant = case.tensor("tile_tokens"), case.tensor("tile_dominant_indices")
    tiles, k = tokens.shape[:2]
    contextual = case.hyper["contextual"]
    slots = torch.zeros(
        1 + tiles, k, dtype=torch.int64
    )  # the vectors leave out the base tile and where contextual tokens stand
    slots[1:, 0] = -1
    slots[1:, 1 : k - contextual] = dominant
    mask = torch.arange(k) < k - contextual
    order = pack_tiles(slots, tuple(case.arrays["tile_grid"].tolist()), case.hyper["tile_side"], mask)
    torch.testing.assert_close(order[:k], torch.arange(k))
    case.check("expected_source_tile", order[k:] // k - 1)
    case.check("expected_source_slot", order[k:] % k)


RUNNERS = {
    "selection_and_merge": selection_and_merge,
    "end_to_end": end_to_end,
    "anyres_packing": anyres_packing,
}
