# SPDX-License-Identifier: Apache-2.0
"""FlowCut: one scoring step, and whole runs of a CLIP tower inside a model, rows alone and in a batch."""

from __future__ import annotations

import json
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

import vlmprune
from vlmprune.core.select import highest
from vlmprune.methods.flowcut import drops, importance

IMAGE = 1  # id of the placeholder


class Seen(NamedTuple):
    """What one prefill showed."""

    counts: list[int]  # patches behind every block
    rows: list[Tensor]  # (B, T, C) that the projector got
    kept: list[Tensor]  # (T,) of every picture


def layer_step(case):
    a, target, left = (
        case.tensor("cls_attention"),
        case.hyper["target_num"],
        case.hyper["remaining_prune_layers"],
    )
    a = a / a.sum(dim=1, keepdim=True)
    score = importance(a, case.tensor("semantic_attention"), case.tensor("values"))
    case.check("score", score)
    c = (case.tensor("previous") + score) / 2
    case.check("cumulative", c)
    n = torch.full((a.shape[0],), a.shape[1])
    drop = drops(a, n, target, left).amax()
    case.check("prune_num", drop[None])
    keep = highest(c, (n - drop).clamp_min(target), torch.ones_like(c, dtype=torch.bool))
    case.check("kept_indices", keep.nonzero()[:, 1].view(a.shape[0], -1))


def model_of(case):
    vision = json.loads(str(case.arrays["config_json"]))
    text = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 8}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **vision},
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=case.hyper["select_layer"],
        vision_feature_select_strategy="default",
        image_seq_length=case.hyper["grid"][0] * case.hyper["grid"][1],
    )
    model = LlavaForConditionalGeneration(config).eval()
    case.load(model.model.vision_tower)
    return model


def run(case, model, pixels: Tensor, variant: str = "row") -> Seen:
    count, seen = case.hyper["grid"][0] * case.hyper["grid"][1], Seen([], [], [])
    ids = torch.cat([torch.full((len(pixels), count), IMAGE), torch.full((len(pixels), 1), 2)], dim=1)
    tower = model.model.vision_tower
    blocks = getattr(tower, "vision_model", tower).encoder.layers
    spec = f"flowcut(variant='{variant}')@{case.hyper['target_num']}"
    handles = []
    with torch.no_grad(), vlmprune.prune(model, spec) as session:
        for block in blocks:
            watch = block.register_forward_hook(
                lambda module, args, out: seen.counts.append(
                    (out[0] if isinstance(out, tuple) else out).shape[1] - 1
                )
            )
            handles.append(watch)
        projector = model.model.multi_modal_projector
        handles.append(projector.register_forward_pre_hook(lambda module, args: seen.rows.append(args[0])))
        model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)
        for handle in handles:
            handle.remove()
        seen.kept.extend(one.keep_idx for one in session.last.keep)
    return seen


def end_to_end(case):
    """The official batch shares its drop counts."""
    seen = run(case, model_of(case), case.tensor("pixel_values"), "official")
    case.check("patches_after_layer", torch.tensor(seen.counts))
    case.check("kept_indices", torch.stack(seen.kept))
    case.check("output_tokens", seen.rows[0])


def end_to_end_rows(case):
    model, pixels = model_of(case), case.tensor("pixel_values")
    batch = run(case, model, pixels)
    case.check("kept_indices", torch.stack(batch.kept))
    case.check("output_tokens", batch.rows[0])
    alone = [run(case, model, pixels[i : i + 1]) for i in range(len(pixels))]
    case.check("patches_after_layer", torch.tensor([seen.counts for seen in alone]))
    case.check("kept_indices_official_batch", torch.stack(run(case, model, pixels, "official").kept))


RUNNERS = {"layer_step": layer_step, "end_to_end": end_to_end, "end_to_end_rows": end_to_end_rows}
