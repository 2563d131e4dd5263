# SPDX-License-Identifier: Apache-2.0
"""VisionZip behind a projector that merges patches, against a twin that shares no code with the hooks.

The twin reads queries and keys of the last block where the eager attention of transformers gets them, pools
them by hand, and runs the language model on the rows that the steps of the paper give.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

import vlmprune
from vlmprune.testing.processors import IMAGE_ID
from vlmprune.testing.reference import dense_rows, logits_of
from vlmprune.testing.tiny import tiny_inputs, tiny_model

MERGERS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
CELL = 4  # patches of a token


def patches_of_the_tower(model, inputs, monkeypatch):
    """(S,) attention received and (S, d) keys of all patches, in the order of the pixels."""
    tower = model.model.visual
    module = sys.modules[type(tower).__module__]
    seen, eager = [], module.eager_attention_forward

    def listening(attention, query, key, value, *rest, **options):
        if attention is tower.blocks[-1].attn:
            seen.append((query.double(), key.double(), options["scaling"]))
        return eager(attention, query, key, value, *rest, **options)

    model.set_attn_implementation("eager")
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(module, "eager_attention_forward", listening)
        model(**inputs)
    model.set_attn_implementation("sdpa")
    received = torch.cat(
        [(q @ k.transpose(-1, -2) * scale).softmax(-1)[0].mean(dim=(0, 1)) for q, k, scale in seen]
    )
    keys = torch.cat([k[0].mean(0) for _, k, _ in seen])
    if hasattr(tower, "window_size"):  # this tower works window by window
        order = module.get_vision_window_index(
            inputs["image_grid_thw"],
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )[0]
        for_tokens = torch.argsort(order)
        received = received.view(-1, CELL)[for_tokens].flatten()
        keys = keys.view(-1, CELL, keys.shape[-1])[for_tokens].flatten(0, 1)
    return received, keys


def steps(x, a, keys, k, contextual, rule):
    """One picture: place -> row, from tokens x (N, D), their attention (N,) and keys (N, d)."""
    n = len(x)
    kept = sorted(np.argsort(-a, kind="stable")[: k - contextual].tolist())
    rest = [i for i in range(n) if i not in kept]
    targets = rest[:: max(1, len(rest) // contextual)][:contextual]
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    joined = {t: [] for t in targets}
    for i in set(rest) - set(targets):
        joined[targets[int(np.argmax(unit[targets] @ unit[i]))]].append(i)
    rows = {i: x[i] for i in kept}
    for t, members in joined.items():
        if rule == "mean":
            rows[t] = x[[t, *members]].mean(0)
        else:
            rows[t] = x[t] + x[members].mean(0) if members else x[t]
    return rows


@pytest.mark.parametrize("family", MERGERS)
@pytest.mark.parametrize(("rule", "k", "contextual"), [("add", 12, 3), ("mean", 9, 5)])
def test_the_answer_is_that_of_a_twin(family, rule, k, contextual, monkeypatch):
    model, inputs = tiny_model(family), tiny_inputs(family, images=(2,))
    received, keys = patches_of_the_tower(model, inputs, monkeypatch)
    a = received.view(-1, CELL).mean(1).numpy()
    pooled = keys.view(-1, CELL, keys.shape[-1]).mean(1).numpy()
    (dense,) = dense_rows(model, inputs)
    columns = (inputs["input_ids"][0] == IMAGE_ID).nonzero()[:, 0]
    embeds = dense.embeds.clone()
    stays = torch.ones(embeds.shape[1], dtype=torch.bool)
    stays[columns] = False
    first = 0
    for frames, high, wide in inputs["image_grid_thw"].tolist():
        own = slice(first, first + frames * high * wide // CELL)
        x = dense.embeds[0, columns[own]].double().numpy()
        for place, row in steps(x, a[own], pooled[own], k, contextual, rule).items():
            stays[columns[own][place]] = True
            embeds[0, columns[own][place]] = torch.from_numpy(row).float()
        first = own.stop
    assert first == len(columns) == len(a)
    dense.embeds = embeds
    spec = f"visionzip(cls=mean,place=after,contextual={contextual},combine={rule})@{k}"
    with vlmprune.prune(model, spec) as run, torch.no_grad():
        got = model(**inputs).logits[0, -1]
    assert run.last.realised_tokens == [k, k]
    torch.testing.assert_close(got, logits_of(model, dense.columns(stays))[-1], rtol=1e-4, atol=1e-4)


def test_rows_of_a_merging_method_keep_the_places_of_their_tokens():
    """With positions as they were, a row stands where its token stood, and not in the order of the method."""
    model, inputs = tiny_model("llava"), tiny_inputs("llava", images=(1,))
    (column,) = (inputs["input_ids"][0] == IMAGE_ID).nonzero()[:1, 0].tolist()
    dense = dense_rows(model, inputs)[0].embeds[0, column : column + 36]
    for positions in ("original", "compact"):
        seen = []
        with vlmprune.prune(model, "visionzip(contextual=3)@12", positions=positions) as run, torch.no_grad():
            hook = model.model.language_model.register_forward_pre_hook(
                lambda module, args, kwargs, seen=seen: seen.append(kwargs["inputs_embeds"][0]),
                with_kwargs=True,
            )
            model(**inputs)
            hook.remove()
        kept = run.last.keep[0].keep_idx.tolist()
        found = {i: (seen[0] == dense[i]).all(dim=1).nonzero()[:, 0].tolist() for i in kept}
        where = [at[0] for at in found.values() if at]  # of dominant rows, which are dense rows
        assert len(where) == 8 and where == sorted(where)
        # contextual rows stand between them, or behind them
        assert (np.diff(where).max() > 1) == (positions == "original")
