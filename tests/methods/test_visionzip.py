# SPDX-License-Identifier: Apache-2.0
"""VisionZip against a literal transcription of its steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from vlmprune.core.method import needs
from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import SpecError
from vlmprune.methods.visionzip import VisionZip, group


def inputs(batch=2, n=36, width=6, crops=1, dtype=torch.float32, seed=0):
    draw = np.random.default_rng(seed).normal
    weight = torch.from_numpy(draw(size=(width, 5))).to(dtype)
    encoded = torch.from_numpy(draw(size=(batch, n, width))).to(dtype)
    return VisualTokens(
        features=encoded @ weight,
        encoder_features=encoded,
        cls_attention=torch.from_numpy(draw(size=(batch, 3, n))).to(dtype).softmax(-1),
        keys=torch.from_numpy(draw(size=(batch, n, 4))).to(dtype),
        cls_features=torch.from_numpy(draw(size=(batch, crops, width))).to(dtype),
        projector=lambda x: x @ weight,
    )


def transcription(h, cls, a, keys, dominant, contextual, rule):
    """One image; ``dominant`` without [CLS]. Returns rows before the projector, slots."""
    n = len(h)
    kept = sorted(np.argsort(-a.sum(0), kind="stable")[:dominant].tolist())
    rest = [i for i in range(n) if i not in kept]
    step = max(1, len(rest) // contextual)
    targets = [rest[i] for i in range(0, len(rest), step)][:contextual]
    unit = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    members = {t: [] for t in targets}
    for i in rest:
        if i not in targets:
            members[targets[int(np.argmax([unit[i] @ unit[t] for t in targets]))]].append(i)
    context = []
    for t in targets:
        if rule == "mean":
            context.append(h[[t, *members[t]]].mean(0))
        else:
            context.append(h[t] + h[members[t]].mean(0) if members[t] else h[t])
    return np.stack([*cls, *h[kept], *context]), [-1] * len(cls) + kept + targets


@pytest.mark.parametrize("rule", ["add", "mean"])
@pytest.mark.parametrize(("k", "contextual"), [(11, 3), (32, 30), (20, 1)])
def test_behind_the_projector_the_rows_are_averages_of_tokens(rule, k, contextual):
    tokens = inputs(dtype=torch.float64)
    method = VisionZip(contextual=contextual, combine=rule, place="after")
    merged = choose(method, replace(tokens, encoder_features=None), k)
    for row in range(2):
        cls = tokens.projector(tokens.cls_features[row]).numpy()
        given = (tokens.features, tokens.cls_attention, tokens.keys)
        x, a, keys = (one[row].numpy() for one in given)
        rows, slots = transcription(x, cls, a, keys, k - 1 - contextual, contextual, rule)
        assert merged.slots[row].tolist() == slots
        torch.testing.assert_close(merged.features[row], torch.from_numpy(rows), rtol=1e-5, atol=1e-5)


def test_only_what_a_place_reads_is_captured():
    wanted = {"received_attention", "keys", "features"}
    assert {need.what for need in VisionZip(cls="mean", place="after").needs} == wanted
    assert {need.what for need in VisionZip(cls="mean").needs} == wanted | {"encoder_features", "projector"}


@pytest.mark.parametrize("rule", ["add", "mean"])
@pytest.mark.parametrize(("k", "contextual", "crops"), [(11, 3, 1), (32, 30, 1), (12, 4, 3), (20, 1, 1)])
def test_rows_follow_the_transcription(rule, k, contextual, crops):
    tokens = inputs(crops=crops, dtype=torch.float64)
    merged = choose(VisionZip(contextual=contextual, combine=rule), tokens, k)
    for row in range(2):
        given = (tokens.encoder_features, tokens.cls_features, tokens.cls_attention, tokens.keys)
        h, cls, a, keys = (x[row].numpy() for x in given)
        rows, slots = transcription(h, cls, a, keys, k - crops - contextual, contextual, rule)
        assert merged.slots[row].tolist() == slots
        torch.testing.assert_close(
            merged.features[row], tokens.projector(torch.from_numpy(rows)), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    ("keep", "dominant_and_cls", "contextual"),
    [(64, 54, 10), (128, 108, 20), (192, 162, 30), (32, 27, 5), (3, 2, 1), (2, 2, 0), (1, 1, 0)],
)
def test_budgets_split_as_published(keep, dominant_and_cls, contextual):
    cls_rows, dominant, context = VisionZip().split(keep)
    assert (cls_rows + dominant, context) == (dominant_and_cls, contextual)


@pytest.mark.parametrize("k", range(1, 36))
def test_every_budget_gives_exactly_its_rows(k):
    merged = choose(VisionZip(), inputs(), k)
    assert merged.features.shape == (2, k, 5)
    assert (merged.slots == -1).sum(1).tolist() == [1, 1]


def test_interleaved_rows_are_the_dominant_ones():
    tokens, method = inputs(), VisionZip(contextual=3)
    merged = choose(method, tokens, 11)
    mask = ~merged.context & (merged.slots[0] >= 0)  # all but contextual and [CLS] rows
    groups = group(method.score(tokens), tokens.keys, 7, 3)
    assert merged.slots[:, mask].tolist() == groups.dominant.tolist()


def test_dominant_patches_are_the_most_attended():
    tokens = inputs(batch=1)
    merged = choose(VisionZip(contextual=2), tokens, 10)
    total = tokens.cls_attention[0].sum(0)
    assert int(total.argmax()) in merged.slots[0, 1:8].tolist()
    assert int(total.argmin()) not in merged.slots[0, 1:8].tolist()


def test_rows_of_a_batch_do_not_mix():
    tokens = inputs()
    second = {
        name: value[1:] if isinstance(value, torch.Tensor) else value for name, value in vars(tokens).items()
    }
    alone = VisualTokens(**second)
    both, one = choose(VisionZip(), tokens, 12), choose(VisionZip(), alone, 12)
    assert both.slots[1].tolist() == one.slots[0].tolist()
    torch.testing.assert_close(both.features[1], one.features[0])


def test_a_key_of_length_zero_gives_no_nan():
    tokens = inputs()
    tokens.keys.zero_()
    merged = choose(VisionZip(), tokens, 12)
    assert torch.isfinite(merged.features).all()


def test_half_precision_sums_are_made_in_float32():
    n = 600
    tokens = VisualTokens(
        features=torch.ones(1, n, 1).bfloat16(),
        encoder_features=torch.ones(1, n, 1).bfloat16(),
        cls_attention=torch.rand(1, 1, n),
        keys=torch.ones(1, n, 2).bfloat16(),
        cls_features=torch.zeros(1, 1, 1).bfloat16(),
        projector=lambda x: x,
    )
    merged = choose(VisionZip(contextual=1), tokens, 3)
    assert merged.features[0, :, 0].tolist() == [
        0.0,
        1.0,
        2.0,
    ]  # a bfloat16 sum of 597 ones would stop at 256
    assert merged.features.dtype == torch.bfloat16


def test_towers_without_cls_have_no_cls_row():
    tokens, method = inputs(), VisionZip(contextual=2, cls="mean")
    received = VisualTokens(
        features=tokens.features,
        encoder_features=tokens.encoder_features,
        keys=tokens.keys,
        projector=tokens.projector,
        received_attention=tokens.cls_attention.mean(1),
    )
    merged = choose(method, received, 9)
    assert not needs(method, "cls_features")
    assert (merged.slots >= 0).all()
    assert merged.slots[:, :7].tolist() == choose(VisionZip(contextual=2), tokens, 10).slots[:, 1:8].tolist()


@pytest.mark.parametrize(
    ("method", "keep", "crops", "least"), [(VisionZip(contextual=10), 8, 1, 11), (VisionZip(), 3, 5, 5)]
)
def test_too_small_budgets_name_the_smallest_that_works(method, keep, crops, least):
    with pytest.raises(SpecError, match=f"keep={keep} is too small.*at least {least}"):
        method.split(keep, crops)
    assert sum(method.split(least, crops)) == least


@pytest.mark.parametrize(
    "options",
    [
        {"combine": "sum"},
        {"contextual": -1},
        {"contextual": 1.5},
        {"cls": "no"},
        {"anyres": "x"},
        {"place": "behind"},
    ],
)
def test_unknown_options_are_refused(options):
    with pytest.raises(SpecError, match=f"{next(iter(options))}="):
        VisionZip(**options)


def test_layout_follows_the_option():
    assert (VisionZip().layout, VisionZip(anyres="spatial").layout) == ("packed", "spatial")
